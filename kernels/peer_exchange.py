"""Low-latency exchange between ranks that can write each other's memory (one node, NVLink): layout, refusals and references.

Each rank has a *window*, a piece of memory that all others can address (torch's symmetric memory or NVSHMEM give the addresses).
Dispatch quantises a token once and writes it into the window of each rank that holds one of its experts; combine writes expert
outputs back, and the token's own rank adds them, weighted, in top-k order. The CPU waits for nothing and every shape is fixed, so
that a graph can hold it. kernels/triton/peer_exchange.py has the kernels: compiled for Hopper, not run on hardware.

Dispatch and combine alternate, on every rank alike. That makes one buffer enough: a rank sends the next dispatch after its
combine has heard from all others, which they sent after they had read their rows; and the other way round.

R ranks, L experts per rank, T tokens of a rank, at most T_max, K choices per token, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.checks import check_number, check_tensor
from moesaic.kernels.permute import weighted_sum
from moesaic.kernels.quant import BLOCK, FP8, empty_scales, quantize_per_token_reference

ALIGNMENT = 128
OPERATIONS = ("dispatch", "combine")


class PeerLate(RuntimeError):  # noqa: N818 - reads as what happened
    """A rank that did not take part in an exchange in time; `rank` and `operation` say which and in what."""

    def __init__(self, rank: int, operation: str) -> None:
        super().__init__(f"rank {rank} did not come to the {operation} in time: its own log says why it stopped or fell behind")
        self.rank, self.operation = rank, operation


@dataclass(frozen=True, kw_only=True)
class PeerLayout:
    """Sizes of the exchange, the same on all ranks, and where what lies in a window, in bytes. Raises ValueError.

    rows [L, R, T_max, row_bytes]: H values e4m3, H / 128 fp32 scales, then the number of the choice, int32. counts int32 [R, L] and
    flags int32 [2, R] from each rank; returned [T_max, K, H] of `dtype`.
    """

    num_ranks: int
    num_local: int
    max_tokens: int
    topk: int
    hidden: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_local", "max_tokens", "topk", "hidden"):
            check_number("PeerLayout", name, getattr(self, name), at_least=1)
        if self.hidden % BLOCK:
            raise ValueError(f"PeerLayout: hidden is {self.hidden}, wanted a multiple of {BLOCK}")

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.num_local

    @property
    def num_blocks(self) -> int:
        return self.hidden // BLOCK

    @property
    def room(self) -> int:
        """Rows that one expert can receive."""
        return self.num_ranks * self.max_tokens

    @property
    def row_bytes(self) -> int:
        return -(-(self.hidden + 4 * self.num_blocks + 4) // 16) * 16

    @property
    def counts_at(self) -> int:
        return _aligned(self.num_local * self.room * self.row_bytes)

    @property
    def flags_at(self) -> int:
        return self.counts_at + _aligned(4 * self.num_experts)

    @property
    def returned_at(self) -> int:
        return self.flags_at + _aligned(8 * self.num_ranks)

    @property
    def num_bytes(self) -> int:
        return self.returned_at + _aligned(self.max_tokens * self.topk * self.hidden * self.dtype.itemsize)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class PeerWindow:
    """One rank's end. own uint8 [num_bytes]: its window, zeros at first; peers int64 [R]: addresses of all windows, its own too.

    step int32 [1], late int32 [2]: zeros at first, kept by the exchange. `most_polls`: how often a program looks for the others'
    flags before it gives up.
    """

    layout: PeerLayout
    rank: int
    own: Tensor
    peers: Tensor
    step: Tensor
    late: Tensor
    most_polls: int = 2**26

    def check(self, function: str) -> None:
        """Raises ValueError where the tensors don't fit the layout."""
        layout = self.layout
        check_tensor(function, "window.own", self.own, shape=(layout.num_bytes,), dtypes=(torch.uint8,))
        check_tensor(function, "window.peers", self.peers, shape=(layout.num_ranks,), dtypes=(torch.int64,), like=self.own)
        check_tensor(function, "window.step", self.step, shape=(1,), dtypes=(torch.int32,), like=self.own)
        check_tensor(function, "window.late", self.late, shape=(2,), dtypes=(torch.int32,), like=self.own)
        check_number(function, "window.rank", self.rank, at_least=0, at_most=layout.num_ranks - 1)
        if self.own.data_ptr() % ALIGNMENT:
            raise ValueError(f"{function}: window.own is at {self.own.data_ptr():#x}, wanted a multiple of {ALIGNMENT}")

    def part(self, at: int, size: int, dtype: torch.dtype) -> Tensor:
        """`size` elements of the window from byte `at` on."""
        return self.own[at : at + size * dtype.itemsize].view(dtype)

    def raise_if_late(self) -> None:
        """Waits for the device. Raises PeerLate if a rank has missed an exchange; what was received then is unspecified."""
        for operation, rank in zip(OPERATIONS, self.late.tolist(), strict=True):
            if rank:
                raise PeerLate(rank - 1, operation)


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """What the experts of a rank received: x e4m3 [L, R * T_max, H] with fp32 scales [L, R * T_max, H / 128] (MN-major, as DeepGEMM
    wants them), of which the first counts int64 [L] rows of each expert are valid, ordered by source rank and token.

    origin int32 [L, R * T_max]: where each row belongs, source rank * T_max * K + token * K + choice.
    """

    x: Tensor
    scales: Tensor
    counts: Tensor
    origin: Tensor


def dispatch_reference(hidden: list[Tensor], topk_ids: list[Tensor], layout: PeerLayout) -> list[Dispatched]:
    """All ranks' hidden [T, H] and topk_ids int64 [T, K] (global slots, -1 = none) -> what each rank's experts receive."""
    received = []
    for rank in range(layout.num_ranks):
        x = torch.zeros(layout.num_local, layout.room, layout.hidden, dtype=FP8)
        scales = empty_scales(x, mn_major=True).zero_()
        counts, origin = torch.zeros(layout.num_local, dtype=torch.int64), torch.zeros(x.shape[:2], dtype=torch.int32)
        for source, (rows, ids) in enumerate(zip(hidden, topk_ids, strict=True)):
            values, own_scales = quantize_per_token_reference(rows)
            for token, choice in (ids.div(layout.num_local, rounding_mode="floor") == rank).nonzero().tolist():
                expert = int(ids[token, choice]) - rank * layout.num_local
                row = int(counts[expert])
                x[expert, row], scales[expert, row] = values[token], own_scales[token]
                origin[expert, row] = (source * layout.max_tokens + token) * layout.topk + choice
                counts[expert] += 1
        received.append(Dispatched(x=x, scales=scales, counts=counts, origin=origin))
    return received


def combine_reference(
    expert_rows: list[Tensor], dispatched: list[Dispatched], weights: list[Tensor], layout: PeerLayout
) -> list[Tensor]:
    """All ranks' expert outputs [L, R * T_max, H] and weights fp32 [T, K] -> each rank's weighted sums [T, H], in top-k order."""
    returned = torch.zeros(layout.num_ranks * layout.max_tokens * layout.topk, layout.hidden, dtype=expert_rows[0].dtype)
    for rows, own in zip(expert_rows, dispatched, strict=True):
        for expert, count in enumerate(own.counts.tolist()):
            returned[own.origin[expert, :count].long()] = rows[expert, :count]
    choices = returned.view(layout.num_ranks, layout.max_tokens, layout.topk, layout.hidden)
    return [weighted_sum(choices[rank, : len(own)], own) for rank, own in enumerate(weights)]
