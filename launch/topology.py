"""The parallel layout: which rank is what, as plain numbers. Pure functions of the flags.

Knows no process, no process group and no model: `ModelShape` carries the few numbers a layout depends on. That a layout
is legal is `launch/layout_rules.py`'s business; here it is taken for granted.

Terms, with `--tp 8 --dp 4 --moe-a2a-backend torch` as the example:
  world_size      all ranks of the instance = tp_size                          8
  attn_tp_size    ranks that share one sequence's attention = tp / dp          2: (0 1) (2 3) (4 5) (6 7)
  dp_rank         which scheduler a rank belongs to = rank // attn_tp_size     0 0 1 1 2 2 3 3
  ep_size         ranks over which whole experts are spread                    8
  moe_tp_size     ranks that share one expert = tp / ep                        1
  leader          the rank with attn_tp_rank 0 of a DP rank                    0 2 4 6
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from moesaic.launch.config import ServerConfig

RankLists = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The model's numbers that a layout must divide.

    `fp8_checkpoint`: the weights are stored as e4m3 blocks with scales.
    """

    num_heads: int
    num_experts: int
    moe_intermediate_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    hidden_size: int = 128
    topk: int = 8
    num_shared_experts: int = 0
    v_head_dim: int = 128
    qk_head_dim: int = 192
    q_lora_rank: int | None = None
    fp8_checkpoint: bool = False


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where one rank stands in every grouping. `local_rank` counts within its node."""

    rank: int
    node_rank: int
    local_rank: int
    dp_rank: int
    attn_tp_rank: int
    ep_rank: int
    moe_tp_rank: int

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for its DP rank: it receives the requests and sends the outputs."""
        return self.attn_tp_rank == 0


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The whole layout. `moe_dense_tp_size` is the ranks that share a dense layer: 1 or attn_tp_size."""

    world_size: int
    nnodes: int
    dp_size: int
    ep_size: int
    moe_dense_tp_size: int

    @staticmethod
    def from_config(config: ServerConfig) -> Topology:
        """The layout that the flags ask for. With an all-to-all backend every rank is an expert-parallel rank."""
        return Topology(
            world_size=config.tp_size,
            nnodes=config.nnodes,
            dp_size=config.dp_size,
            ep_size=config.ep_size if config.moe_a2a_backend == "none" else config.tp_size,
            moe_dense_tp_size=config.moe_dense_tp_size or config.tp_size // config.dp_size,
        )

    @property
    def ranks_per_node(self) -> int:
        return self.world_size // self.nnodes

    @property
    def attn_tp_size(self) -> int:
        return self.world_size // self.dp_size

    @property
    def moe_tp_size(self) -> int:
        return self.world_size // self.ep_size

    def place(self, rank: int) -> RankPlace:
        """Where `rank` stands."""
        assert 0 <= rank < self.world_size
        return RankPlace(
            rank=rank,
            node_rank=rank // self.ranks_per_node,
            local_rank=rank % self.ranks_per_node,
            dp_rank=rank // self.attn_tp_size,
            attn_tp_rank=rank % self.attn_tp_size,
            ep_rank=rank // self.moe_tp_size,
            moe_tp_rank=rank % self.moe_tp_size,
        )

    def places(self) -> tuple[RankPlace, ...]:
        """Every rank's place, in rank order."""
        return tuple(self.place(rank) for rank in range(self.world_size))

    def ranks_of_node(self, node_rank: int) -> range:
        """The ranks that run on one node: consecutive."""
        return range(node_rank * self.ranks_per_node, (node_rank + 1) * self.ranks_per_node)

    def slots_of(self, ep_rank: int, num_slots: int) -> range:
        """The expert slots that one expert-parallel rank holds: consecutive, equally many on each."""
        num_local = num_slots // self.ep_size
        return range(ep_rank * num_local, (ep_rank + 1) * num_local)

    @property
    def attn_tp_groups(self) -> RankLists:
        """Ranks that share one sequence's attention: consecutive."""
        size = self.attn_tp_size
        return tuple(tuple(range(first, first + size)) for first in range(0, self.world_size, size))

    @property
    def dp_groups(self) -> RankLists:
        """One rank of each DP rank, those with the same attn_tp_rank."""
        size = self.attn_tp_size
        return tuple(tuple(range(first, self.world_size, size)) for first in range(size))


def summarize_topology(topology: Topology) -> str:
    """The layout in one line."""
    return (
        f"{_count(topology.world_size, 'rank')} on {_count(topology.nnodes, 'node')}: "
        f"DP attention {topology.dp_size} x attention TP {topology.attn_tp_size}, "
        f"EP {topology.ep_size} x expert TP {topology.moe_tp_size}, dense TP {topology.moe_dense_tp_size}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def render_topology(topology: Topology, num_slots: int) -> Table:
    """The layout as a table for the terminal, one row per rank; `num_slots` expert slots a layer."""
    from rich.table import Table

    table = Table()
    for column in ("rank", "node", "dp_rank", "attn_tp_rank", "ep_rank", "expert slots"):
        table.add_column(column, justify="right")
    for place in topology.places():
        slots = topology.slots_of(place.ep_rank, num_slots)
        numbers = (place.rank, place.node_rank, place.dp_rank, place.attn_tp_rank, place.ep_rank)
        table.add_row(*map(str, numbers), f"{slots.start}..{slots.stop - 1}" if slots else "-")
    return table
