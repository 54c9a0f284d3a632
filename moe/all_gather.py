"""Backend `none`: every rank sees all tokens, computes its own experts (or its slice of each expert), and the sums are reduced.

With DP attention the tokens of the DP ranks are gathered first; with plain tensor parallelism all ranks hold them already. The
number of ranks that split one expert (moe TP) doesn't matter here: their partial sums add up like those of different experts.
Halves: the first half of all tokens (rounded up) and the others. How gloo orders the sums of three ranks or more depends on where
a row lies, so there halves may differ from the whole in the last bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.torch_names import all_gather_single
from moesaic.moe.communication import Communications, Waitable
from moesaic.moe.config import ExpertPlacement
from moesaic.moe.dispatcher import DispatchPlan, Received, ReceivedHalf
from moesaic.moe.gate import TopK
from moesaic.moe.layouts import Arranged, ArrangedPart, ExpertLayout, arrange, part_of, weighted
from moesaic.moe.token_bytes import pack_tokens, pad_rows, unpack_tokens


@dataclass(kw_only=True)
class GatherHandle:
    """A dispatch, or half of one on its way back: what was gathered, then the layout, then the partial sums.

    own: the rank's own tokens among those that are combined.
    """

    plan: DispatchPlan
    hidden: Tensor
    topk: TopK
    own: slice
    work: Waitable | None = None
    gathered: Tensor | None = None
    weights: Tensor | None = None
    layout: Arranged | ArrangedPart | None = None


class AllGatherDispatcher:
    """`dp_group`: one rank of every DP group (None when dp is 1); `reduce_group`: all ranks that hold parts of the experts.

    The plan's num_tokens_per_rank counts tokens per DP rank here.
    """

    def __init__(
        self,
        *,
        placement: ExpertPlacement,
        dp_rank: int,
        dp_size: int,
        dp_group: dist.ProcessGroup | None,
        reduce_group: dist.ProcessGroup | None,
        communications: Communications,
        alignment: int,
    ) -> None:
        self._placement = placement
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._dp_group = dp_group
        self._reduce_group = reduce_group
        self._communications = communications
        self._alignment = alignment

    def dispatch_a(self, hidden: Tensor, topk: TopK, plan: DispatchPlan) -> GatherHandle:
        start = sum(plan.num_tokens_per_rank[: self._dp_rank])
        handle = GatherHandle(plan=plan, hidden=hidden, topk=topk, own=slice(start, start + len(hidden)))
        if self._dp_size > 1 and plan.max_tokens:
            packed = pad_rows(pack_tokens(hidden, topk.ids, topk.weights), plan.max_tokens)
            handle.gathered = packed.new_empty(self._dp_size * plan.max_tokens, packed.shape[1])
            work = all_gather_single(handle.gathered, packed, group=self._dp_group, async_op=True)
            handle.work = self._communications.post("dispatch", work, packed)
        return handle

    def dispatch_b(self, handle: GatherHandle) -> Received[GatherHandle]:
        hidden, ids, weights = handle.hidden, handle.topk.ids, handle.topk.weights
        if handle.work is not None:
            assert handle.gathered is not None
            handle.work.wait()
            valid = torch.cat(
                [
                    handle.gathered[rank * handle.plan.max_tokens :][:count]
                    for rank, count in enumerate(handle.plan.num_tokens_per_rank)
                ]
            )
            hidden, ids, weights = unpack_tokens(valid, hidden.dtype, ids.shape[1])
        if self._placement.ep_size > 1:
            local = ids - self._placement.first
            ids = torch.where((local >= 0) & (local < self._placement.num_local), local, -1)
        handle.weights = weights
        place = self._placement
        layout = ExpertLayout(mode=handle.plan.mode, num_local=place.num_local, alignment=self._alignment, ep_size=place.ep_size)
        arranged = arrange(hidden, ids, layout)
        handle.layout = arranged
        return Received(rows=arranged.rows, handle=handle)

    def halve(self, received: Received[GatherHandle]) -> tuple[ReceivedHalf[GatherHandle], ReceivedHalf[GatherHandle]]:
        assert received.handle.weights is not None, "a dispatch is halved once it was received"
        num_tokens = len(received.handle.weights)
        cut = -(-num_tokens // 2)
        return self._half(received.handle, 0, cut), self._half(received.handle, cut, num_tokens)

    def combine_a(self, expert_rows: Tensor, handle: GatherHandle) -> GatherHandle:
        assert handle.layout is not None and handle.weights is not None, "combine comes after dispatch"
        handle.gathered = weighted(expert_rows, handle.layout.row_map, handle.weights)
        handle.work = None
        if self._reduce_group is not None and handle.gathered.numel():
            work = dist.all_reduce(handle.gathered, group=self._reduce_group, async_op=True)
            handle.work = self._communications.post("combine", work, handle.gathered)
        return handle

    def combine_b(self, handle: GatherHandle) -> Tensor:
        assert handle.gathered is not None, "combine_b comes after combine_a"
        if handle.work is not None:
            handle.work.wait()
        return handle.gathered[handle.own]

    @staticmethod
    def _half(handle: GatherHandle, start: int, stop: int) -> ReceivedHalf[GatherHandle]:
        """Of all ranks' tokens [start, stop)."""
        assert isinstance(handle.layout, Arranged) and handle.weights is not None, "a dispatch is halved once it was received"
        part = part_of(handle.layout, torch.arange(start, stop, device=handle.weights.device))
        own = GatherHandle(
            plan=handle.plan,
            hidden=handle.hidden,
            topk=handle.topk,
            own=slice(max(handle.own.start, start) - start, max(min(handle.own.stop, stop) - start, 0)),
            layout=part,
            weights=handle.weights[start:stop],
        )
        return ReceivedHalf(pick=part.pick, handle=own)
