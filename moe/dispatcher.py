"""The dispatcher protocol: tokens to the ranks that hold their experts, and the weighted results back.

Each direction is two calls, so that overlap can put work between them: `*_a` submits, `*_b` waits. What a dispatch delivers is one
of two layouts, decided by the step's mode (see dispatch_mode.py): contiguous rows for `normal`, a fixed masked block for
`low_latency`. A step's mode is the same on every rank of the group. What was received may go back in halves, the first while the
experts still compute the second: see `Dispatcher.halve`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.gate import TopK


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """What all ranks of the group know of a step before it runs. num_tokens_per_rank: tokens that each rank dispatches.

    overlaps: other work is submitted between dispatch_a and dispatch_b.
    """

    mode: DispatchMode
    num_tokens_per_rank: tuple[int, ...]
    overlaps: bool = False

    @property
    def max_tokens(self) -> int:
        return max(self.num_tokens_per_rank)


@dataclass(frozen=True, kw_only=True)
class ContiguousRows:
    """Normal layout: hidden [sum(counts), H], sorted by local expert; counts (padded to the alignment) per local expert.

    What pads a block is unspecified, as are the rows of `MaskedRows` that are not valid.
    scales: None, or `hidden` is e4m3 and these are its, fp32 [sum(counts), H / 128].
    """

    hidden: Tensor
    counts: list[int]
    scales: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MaskedRows:
    """Low-latency layout: hidden [num_local, M, H], of which the first counts[e] rows of expert e are valid (int64, on device).

    scales: None, or `hidden` is e4m3 and these are its, fp32 [num_local, M, H / 128]. expected_rows: per expert, on average (None:
    nobody knows); kernels may choose their tiles by it.
    """

    hidden: Tensor
    counts: Tensor
    scales: Tensor | None = None
    expected_rows: int | None = None


ExpertRows = ContiguousRows | MaskedRows

HandleT = TypeVar("HandleT")


@dataclass(kw_only=True)
class Received(Generic[HandleT]):
    """What dispatch_b delivers: the rows for this rank's experts, and the handle that combine needs."""

    rows: ExpertRows
    handle: HandleT


@dataclass(frozen=True, kw_only=True)
class ReceivedHalf(Generic[HandleT]):
    """Half of what dispatch_b delivered, by tokens.

    pick: expert rows of the whole (any width) -> this half's, in a layout of their own. handle: to combine them with.
    """

    pick: Callable[[ExpertRows], ExpertRows]
    handle: HandleT


class Dispatcher(Protocol[HandleT]):
    """One all-to-all backend for one group of expert ranks. Handles are opaque and used once."""

    def dispatch_a(self, hidden: Tensor, topk: TopK, plan: DispatchPlan) -> HandleT:
        """Begin to send hidden [T, H] (T = this rank's count in the plan) to the ranks of its experts."""
        ...

    def dispatch_b(self, handle: HandleT) -> Received[HandleT]:
        """Wait for the tokens of this rank's experts. In normal mode the CPU waits here."""
        ...

    def halve(self, received: Received[HandleT]) -> tuple[ReceivedHalf[HandleT], ReceivedHalf[HandleT]]:
        """Two halves to combine one after the other, instead of the whole. (Some dispatchers must be made to.)

        Every rank takes the same tokens into the first half without asking; one of the halves may be empty. Communicates nothing.
        """
        ...

    def combine_a(self, expert_rows: Tensor, handle: HandleT) -> HandleT:
        """Begin to return the experts' outputs, given in the layout of `Received.rows` or of a half's."""
        ...

    def combine_b(self, handle: HandleT) -> Tensor:
        """Wait, and return the weighted sum over each token's experts, [T, H]; of a half: of its tokens, the first half's first."""
        ...
