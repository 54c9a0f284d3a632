"""A rank's place in the parallel layout, with its process groups, as the model needs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """rank = dp_rank * attn_tp_size + attn_tp_rank = ep_rank * moe_tp_size + moe_tp_rank. Groups of one rank are None.

    `dp_group` joins the ranks with the same attn_tp_rank, `attn_tp_group` those of one DP rank, `world_group` all; so does
    `rows_group`, for what an all-to-all sends from another thread (moe/counted_exchange.py). `a2a_backend` is "none", "torch",
    "symm", "deepep" or "deepep_v2".
    """

    rank: int = 0
    world_size: int = 1
    ranks_per_node: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    attn_tp_rank: int = 0
    attn_tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    moe_tp_rank: int = 0
    moe_tp_size: int = 1
    dense_tp: bool = True
    dp_lm_head: bool = True
    a2a_backend: str = "none"
    world_group: dist.ProcessGroup | None = None
    attn_tp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    rows_group: dist.ProcessGroup | None = None

    @property
    def scatters_tokens(self) -> bool:
        """Whether each attention-TP rank dispatches its own share of the DP group's tokens."""
        return self.a2a_backend != "none" and self.attn_tp_size > 1

    @property
    def counts_tokens(self) -> bool:
        """Whether this rank alone answers for the tokens it sees: the ranks of one attention-TP group see the same, unless each
        dispatches its own share.
        """
        return self.attn_tp_rank == 0 or self.scatters_tokens
