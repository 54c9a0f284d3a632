"""Backend `none`: every rank sees all tokens, computes its own experts (or its slice of each expert), and the sums are reduced.

With DP attention the tokens of the DP ranks are gathered first; with plain tensor parallelism all ranks hold them already. The
number of ranks that split one expert (moe TP) doesn't matter here: their partial sums add up like those of different experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.moe.config import ExpertPlacement
from moesaic.moe.dispatcher import DispatchPlan, Received
from moesaic.moe.gate import TopK
from moesaic.moe.layouts import Arranged, arrange, weighted
from moesaic.moe.token_bytes import pack_tokens, pad_rows, unpack_tokens

# torch 2.13 renamed all_gather_into_tensor; earlier releases know only the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(kw_only=True)
class GatherHandle:
    """A step's state: own tokens' bounds among all tokens, the gathered choices, then the layout, then the partial sums."""

    plan: DispatchPlan
    hidden: Tensor
    topk: TopK
    work: dist.Work | None = None
    gathered: Tensor | None = None
    weights: Tensor | None = None
    arranged: Arranged | None = None


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
        alignment: int,
    ) -> None:
        self._placement = placement
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._dp_group = dp_group
        self._reduce_group = reduce_group
        self._alignment = alignment

    def dispatch_a(self, hidden: Tensor, topk: TopK, plan: DispatchPlan) -> GatherHandle:
        handle = GatherHandle(plan=plan, hidden=hidden, topk=topk)
        if self._dp_size > 1 and plan.max_tokens:
            packed = pad_rows(pack_tokens(hidden, topk.ids, topk.weights), plan.max_tokens)
            handle.gathered = packed.new_empty(self._dp_size * plan.max_tokens, packed.shape[1])
            handle.work = _all_gather(handle.gathered, packed, group=self._dp_group, async_op=True)
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
        handle.arranged = arrange(hidden, ids, self._placement.num_local, handle.plan.mode, self._alignment)
        return Received(rows=handle.arranged.rows, handle=handle)

    def combine_a(self, expert_rows: Tensor, handle: GatherHandle) -> GatherHandle:
        assert handle.arranged is not None and handle.weights is not None, "combine comes after dispatch"
        handle.gathered = weighted(expert_rows, handle.arranged.row_map, handle.weights)
        handle.work = None
        if self._reduce_group is not None and handle.gathered.numel():
            handle.work = dist.all_reduce(handle.gathered, group=self._reduce_group, async_op=True)
        return handle

    def combine_b(self, handle: GatherHandle) -> Tensor:
        assert handle.gathered is not None, "combine_b comes after combine_a"
        if handle.work is not None:
            handle.work.wait()
        if self._dp_size == 1:
            return handle.gathered
        start = sum(handle.plan.num_tokens_per_rank[: self._dp_rank])
        return handle.gathered[start : start + handle.hidden.shape[0]]
