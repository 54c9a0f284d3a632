"""Backend `torch`: expert parallelism over `all_to_all_single` (gloo on CPU, NCCL on GPUs), in both dispatch modes.

A token is sent once to each rank that holds any of its experts. Normal mode exchanges counts, then exactly the rows needed, and
returns one weighted partial sum per (token, rank). Low-latency mode sends fixed blocks whose size all ranks know from the header
(one message each way, no counts), and returns every choice, weighted by the source in top-k order.

R ranks, E_local experts per rank, K choices per token, T tokens of this rank, T_max the largest T of the group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.permute import weighted_sum
from moesaic.moe.config import ExpertPlacement
from moesaic.moe.dispatcher import DispatchMode, DispatchPlan, Received
from moesaic.moe.gate import TopK
from moesaic.moe.layouts import Arranged, arrange, per_choice, weighted
from moesaic.moe.token_bytes import empty_token, pack_tokens, unpack_tokens


@dataclass(kw_only=True)
class AllToAllHandle:
    """A step's state between the stages. `tokens`/`ranks` list what was sent, rank by rank, as (token, destination) pairs."""

    plan: DispatchPlan
    hidden: Tensor
    topk: TopK
    tokens: Tensor
    ranks: Tensor
    send_counts: list[int]
    payload: Tensor
    recv_counts: Tensor | None = None
    recv_splits: list[int] = field(default_factory=list)
    received: Tensor | None = None
    work: dist.Work | None = None
    arranged: Arranged | None = None
    weights: Tensor | None = None
    returned: Tensor | None = None


class AllToAllDispatcher:
    """All-to-all among the expert ranks. A group of one rank communicates with nobody and needs no process group."""

    def __init__(self, *, placement: ExpertPlacement, group: dist.ProcessGroup | None, alignment: int) -> None:
        if placement.ep_size > 1 and group is None:
            raise ValueError(f"expert parallelism over {placement.ep_size} ranks needs a process group")
        self._placement = placement
        self._group = group
        self._alignment = alignment

    def dispatch_a(self, hidden: Tensor, topk: TopK, plan: DispatchPlan) -> AllToAllHandle:
        size, num_local = self._placement.ep_size, self._placement.num_local
        owner = topk.ids.div(num_local, rounding_mode="floor")
        wanted = torch.zeros(hidden.shape[0], size, dtype=torch.bool, device=hidden.device).scatter_(1, owner, True)
        ranks, tokens = wanted.t().nonzero(as_tuple=True)
        ids = topk.ids[tokens]
        ids = torch.where(owner[tokens] == ranks.unsqueeze(1), ids - ranks.unsqueeze(1) * num_local, -1)
        handle = AllToAllHandle(
            plan=plan,
            hidden=hidden,
            topk=topk,
            tokens=tokens,
            ranks=ranks,
            send_counts=[],
            payload=pack_tokens(hidden[tokens], ids, topk.weights[tokens]),
        )
        if plan.mode is DispatchMode.LOW_LATENCY:
            self._send_fixed(handle, wanted)
        else:
            counts = wanted.sum(0)
            handle.send_counts = counts.tolist()
            handle.recv_counts = torch.empty_like(counts)
            handle.work = self._exchange(handle.recv_counts, counts)
        return handle

    def dispatch_b(self, handle: AllToAllHandle) -> Received[AllToAllHandle]:
        if handle.plan.mode is DispatchMode.NORMAL:
            self._send_counted(handle)
        _wait(handle)
        assert handle.received is not None
        hidden, ids, handle.weights = unpack_tokens(handle.received, handle.hidden.dtype, handle.topk.ids.shape[1])
        handle.arranged = arrange(hidden, ids, self._placement.num_local, handle.plan.mode, self._alignment)
        return Received(rows=handle.arranged.rows, handle=handle)

    def combine_a(self, expert_rows: Tensor, handle: AllToAllHandle) -> AllToAllHandle:
        assert handle.arranged is not None and handle.weights is not None, "combine comes after dispatch"
        row_map = handle.arranged.row_map
        if handle.plan.mode is DispatchMode.NORMAL:
            sums = weighted(expert_rows, row_map, handle.weights)
            handle.returned = sums.new_empty(len(handle.tokens), sums.shape[1])
            handle.work = self._exchange(handle.returned, sums, handle.send_counts, handle.recv_splits)
        else:
            packed = _pack_choices(per_choice(expert_rows, row_map), row_map.valid, self._choices_per_rank(handle))
            handle.returned = torch.empty_like(packed)
            handle.work = self._exchange(handle.returned, packed)
        return handle

    def combine_b(self, handle: AllToAllHandle) -> Tensor:
        _wait(handle)
        assert handle.returned is not None, "combine_b comes after combine_a"
        if handle.plan.mode is DispatchMode.NORMAL:
            total = torch.zeros_like(handle.hidden, dtype=torch.float32)
            return total.index_add_(0, handle.tokens, handle.returned.float()).to(handle.hidden.dtype)
        return self._sum_choices(handle)

    def _send_counted(self, handle: AllToAllHandle) -> None:
        """Wait for the counts, then send exactly the rows that each rank needs."""
        _wait(handle)
        assert handle.recv_counts is not None
        handle.recv_splits = handle.recv_counts.tolist()
        handle.received = handle.payload.new_empty(sum(handle.recv_splits), handle.payload.shape[1])
        handle.work = self._exchange(handle.received, handle.payload, handle.recv_splits, handle.send_counts)

    def _send_fixed(self, handle: AllToAllHandle, wanted: Tensor) -> None:
        """Send T_max rows to every rank, the unused ones with ids -1, so that nobody needs counts."""
        num_rows = handle.plan.max_tokens
        slots = (wanted.long().cumsum(0) - 1)[handle.tokens, handle.ranks]
        hidden_size, topk = handle.hidden.shape[1], handle.topk.ids.shape[1]
        empty = empty_token(hidden_size, topk, handle.hidden.dtype, handle.hidden.device)
        blocks = empty.repeat(self._placement.ep_size * num_rows, 1)
        blocks[handle.ranks * num_rows + slots] = handle.payload
        handle.received = torch.empty_like(blocks)
        handle.work = self._exchange(handle.received, blocks)

    def _choices_per_rank(self, handle: AllToAllHandle) -> int:
        """The most choices of one token that one rank can hold."""
        return min(handle.topk.ids.shape[1], self._placement.num_local)

    def _sum_choices(self, handle: AllToAllHandle) -> Tensor:
        """Pick each token's choices out of the returned blocks [R, T_max, choices, H] and weight them in top-k order."""
        assert handle.returned is not None
        ids = handle.topk.ids
        owner = ids.div(self._placement.num_local, rounding_mode="floor")
        sent = torch.zeros(len(ids), self._placement.ep_size, dtype=torch.long, device=ids.device).scatter_(1, owner, 1)
        slot = sent.cumsum(0) - 1
        same_before = torch.tril(owner.unsqueeze(2) == owner.unsqueeze(1), diagonal=-1).sum(2)
        row = (owner * handle.plan.max_tokens + slot.gather(1, owner)) * self._choices_per_rank(handle) + same_before
        choices = handle.returned.view(-1, handle.hidden.shape[1]).index_select(0, row.flatten())
        outputs = choices.view(*ids.shape, handle.hidden.shape[1])
        return weighted_sum(outputs, handle.topk.weights)

    def _exchange(
        self, out: Tensor, send: Tensor, out_splits: list[int] | None = None, send_splits: list[int] | None = None
    ) -> dist.Work | None:
        """all_to_all_single over rows; equal splits when none are given. A group of one copies."""
        if self._placement.ep_size == 1:
            out.copy_(send)
            return None
        work: dist.Work = dist.all_to_all_single(out, send, out_splits, send_splits, group=self._group, async_op=True)
        return work


def _wait(handle: AllToAllHandle) -> None:
    if handle.work is not None:
        handle.work.wait()
        handle.work = None


def _pack_choices(choices: Tensor, valid: Tensor, width: int) -> Tensor:
    """choices [M, K, H], of which at most `width` per token are valid -> the valid ones first, [M, width, H]."""
    order = torch.argsort(valid.int(), dim=1, descending=True, stable=True)[:, :width]
    return choices.gather(1, order.unsqueeze(-1).expand(-1, -1, choices.shape[2]))
