"""Backend `torch`: expert parallelism over `all_to_all_single` (gloo on CPU, NCCL on GPUs), in both dispatch modes.

A token is sent once to each rank that holds any of its experts. Normal mode exchanges counts, then exactly the rows needed, and
returns one weighted partial sum per (token, rank). Low-latency mode sends fixed blocks whose size all ranks know from the header
(one message each way, no counts), and returns every choice, weighted by the source in top-k order.

R ranks, E_local experts per rank, K choices per token, T tokens of this rank, T_max the largest T of the group. Halves: the first
T / 2 tokens of each rank (rounded up; T_max / 2 in low-latency mode) and its others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.permute import weighted_sum
from moesaic.moe.communication import Communications, Waitable
from moesaic.moe.config import ExpertPlacement
from moesaic.moe.counted_exchange import CountedExchange, CountedRows
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan, Received, ReceivedHalf
from moesaic.moe.gate import TopK
from moesaic.moe.layouts import Arranged, ArrangedPart, ExpertLayout, arrange, part_of, per_choice, weighted
from moesaic.moe.token_bytes import empty_token, pack_tokens, unpack_tokens


@dataclass(kw_only=True)
class AllToAllHandle:
    """A dispatch, or half of one on its way back.

    tokens: what was sent, rank by rank, as numbers of this rank's tokens. sent, arrived (normal mode): rows to and from each rank.
    block_rows (low latency): T_max, or a half's share of it.
    """

    mode: DispatchMode
    hidden: Tensor
    topk: TopK
    tokens: Tensor
    block_rows: int
    sent: list[int] | None = None
    arrived: list[int] | None = None
    counted: CountedRows | None = None
    received: Tensor | None = None
    work: Waitable | None = None
    layout: Arranged | ArrangedPart | None = None
    weights: Tensor | None = None
    returned: Tensor | None = None


class AllToAllDispatcher:
    """All-to-all among the expert ranks. A group of one rank communicates with nobody and needs no process group.

    `exchange`: of the counted rows of normal mode, shared by the layers of a model. `halves`: what is received may be halved.
    """

    def __init__(
        self,
        *,
        placement: ExpertPlacement,
        group: dist.ProcessGroup | None,
        exchange: CountedExchange,
        communications: Communications,
        alignment: int,
        halves: bool = False,
    ) -> None:
        if placement.ep_size > 1 and group is None:
            raise ValueError(f"expert parallelism over {placement.ep_size} ranks needs a process group")
        self._placement = placement
        self._group = group
        self._exchange = exchange
        self._communications = communications
        self._alignment = alignment
        self._halves = halves

    def dispatch_a(self, hidden: Tensor, topk: TopK, plan: DispatchPlan) -> AllToAllHandle:
        size, num_local = self._placement.ep_size, self._placement.num_local
        owner = topk.ids.div(num_local, rounding_mode="floor")
        wanted = hidden.new_zeros(hidden.shape[0], 1 + size, dtype=torch.bool).scatter_(1, owner + 1, True)[:, 1:]
        ranks, tokens = wanted.t().nonzero(as_tuple=True)
        ids = topk.ids[tokens]
        ids = torch.where(owner[tokens] == ranks.unsqueeze(1), ids - ranks.unsqueeze(1) * num_local, -1)
        payload = pack_tokens(hidden[tokens], ids, topk.weights[tokens])
        handle = AllToAllHandle(mode=plan.mode, hidden=hidden, topk=topk, tokens=tokens, block_rows=plan.max_tokens)
        if plan.mode is DispatchMode.LOW_LATENCY:
            self._send_fixed(handle, payload, ranks)
        else:
            self._send_counted(handle, payload, wanted, plan)
        return handle

    def dispatch_b(self, handle: AllToAllHandle) -> Received[AllToAllHandle]:
        _wait(handle)
        if handle.counted is not None:
            handle.received = handle.counted.received
            handle.sent, handle.arrived = ([sum(parts) for parts in each] for each in (handle.counted.sent, handle.counted.counts))
        assert handle.received is not None, "dispatch_b comes after dispatch_a"
        hidden, ids, handle.weights = unpack_tokens(handle.received, handle.hidden.dtype, handle.topk.ids.shape[1])
        place = self._placement
        layout = ExpertLayout(mode=handle.mode, num_local=place.num_local, alignment=self._alignment, ep_size=place.ep_size)
        arranged = arrange(hidden, ids, layout)
        handle.layout = arranged
        return Received(rows=arranged.rows, handle=handle)

    def halve(self, received: Received[AllToAllHandle]) -> tuple[ReceivedHalf[AllToAllHandle], ReceivedHalf[AllToAllHandle]]:
        assert self._halves, "the dispatcher was not made to halve"
        handle = received.handle
        num_tokens, block_rows = len(handle.hidden), handle.block_rows
        if handle.counted is None:
            cut = first_rows = -(-block_rows // 2)
            in_first = torch.arange(block_rows, device=handle.hidden.device).repeat(self._placement.ep_size) < cut
        else:
            cut, first_rows = -(-num_tokens // 2), 0
            in_first = _runs(handle.counted.counts, handle.hidden.device)
        cut = min(cut, num_tokens)
        return (
            self._half(handle, 0, slice(0, cut), first_rows, in_first.nonzero().flatten()),
            self._half(handle, 1, slice(cut, num_tokens), block_rows - first_rows, (~in_first).nonzero().flatten()),
        )

    def combine_a(self, expert_rows: Tensor, handle: AllToAllHandle) -> AllToAllHandle:
        assert handle.layout is not None and handle.weights is not None, "combine comes after dispatch"
        row_map = handle.layout.row_map
        if handle.mode is DispatchMode.NORMAL:
            sums = weighted(expert_rows, row_map, handle.weights)
            handle.returned = sums.new_empty(len(handle.tokens), sums.shape[1])
            handle.work = self._post("combine", handle.returned, sums, handle.sent, handle.arrived)
        else:
            packed = _pack_choices(per_choice(expert_rows, row_map), row_map.valid, self._choices_per_rank(handle))
            handle.returned = torch.empty_like(packed)
            handle.work = self._post("combine", handle.returned, packed)
        return handle

    def combine_b(self, handle: AllToAllHandle) -> Tensor:
        _wait(handle)
        assert handle.returned is not None, "combine_b comes after combine_a"
        if handle.mode is DispatchMode.NORMAL:
            total = torch.zeros_like(handle.hidden, dtype=torch.float32)
            return total.index_add_(0, handle.tokens, handle.returned.float()).to(handle.hidden.dtype)
        return self._sum_choices(handle)

    def _send_counted(self, handle: AllToAllHandle, payload: Tensor, wanted: Tensor, plan: DispatchPlan) -> None:
        """Send exactly the rows that each rank needs, after their counts; those of each half apart."""
        if self._halves:
            cut = -(-len(wanted) // 2)
            counts = torch.stack([wanted[:cut].sum(0), wanted[cut:].sum(0)], dim=1)
        else:
            counts = wanted.sum(0).unsqueeze(1)
        ahead = (plan.overlaps or self._halves) and payload.device.type == "cpu"
        handle.counted = self._exchange.start(payload, counts, ahead=ahead, most_rows=sum(plan.num_tokens_per_rank))
        if self._placement.ep_size > 1:
            handle.work = self._communications.mark("dispatch", handle.counted, payload)

    def _send_fixed(self, handle: AllToAllHandle, payload: Tensor, ranks: Tensor) -> None:
        """Send T_max rows to every rank, so that nobody needs counts: a token's row is its number, unused rows have ids -1."""
        hidden_size, topk = handle.hidden.shape[1], handle.topk.ids.shape[1]
        empty = empty_token(hidden_size, topk, handle.hidden.dtype, handle.hidden.device)
        blocks = empty.repeat(self._placement.ep_size * handle.block_rows, 1)
        blocks[ranks * handle.block_rows + handle.tokens] = payload
        handle.received = torch.empty_like(blocks)
        handle.work = self._post("dispatch", handle.received, blocks)

    def _half(
        self, handle: AllToAllHandle, half: int, tokens: slice, block_rows: int, chosen: Tensor
    ) -> ReceivedHalf[AllToAllHandle]:
        """tokens: this rank's own of the half. chosen int64: the received tokens of the half."""
        assert isinstance(handle.layout, Arranged) and handle.weights is not None, "a dispatch is halved once it was received"
        part = part_of(handle.layout, chosen)
        own = AllToAllHandle(
            mode=handle.mode,
            hidden=handle.hidden[tokens],
            topk=TopK(ids=handle.topk.ids[tokens], weights=handle.topk.weights[tokens]),
            tokens=handle.tokens[(handle.tokens >= tokens.start) & (handle.tokens < tokens.stop)] - tokens.start,
            block_rows=block_rows,
            layout=part,
            weights=handle.weights[chosen],
        )
        if handle.counted is not None:
            own.sent, own.arrived = ([parts[half] for parts in each] for each in (handle.counted.sent, handle.counted.counts))
        return ReceivedHalf(pick=part.pick, handle=own)

    def _choices_per_rank(self, handle: AllToAllHandle) -> int:
        """The most choices of one token that one rank can hold."""
        return min(handle.topk.ids.shape[1], self._placement.num_local)

    def _sum_choices(self, handle: AllToAllHandle) -> Tensor:
        """Pick each token's choices out of the returned blocks [R, T_max, choices, H] and weight them in top-k order."""
        assert handle.returned is not None
        ids = handle.topk.ids
        owner = ids.div(self._placement.num_local, rounding_mode="floor")
        same_before = torch.tril(owner.unsqueeze(2) == owner.unsqueeze(1), diagonal=-1).sum(2)
        token = torch.arange(len(ids), device=ids.device).unsqueeze(1)
        row = (owner * handle.block_rows + token) * self._choices_per_rank(handle) + same_before
        row.clamp_(min=0)  # any row for choices of nobody: their weight is 0
        choices = handle.returned.view(-1, handle.hidden.shape[1]).index_select(0, row.flatten())
        outputs = choices.view(*ids.shape, handle.hidden.shape[1])
        return weighted_sum(outputs, handle.topk.weights)

    def _post(
        self, name: str, out: Tensor, send: Tensor, out_splits: list[int] | None = None, send_splits: list[int] | None = None
    ) -> Waitable | None:
        """all_to_all_single over rows; equal splits when none are given. A group of one copies."""
        if self._placement.ep_size == 1:
            out.copy_(send)
            return None
        work = dist.all_to_all_single(out, send, out_splits, send_splits, group=self._group, async_op=True)
        return self._communications.post(name, work, send)


def _wait(handle: AllToAllHandle) -> None:
    if handle.work is not None:
        handle.work.wait()
        handle.work = None


def _runs(counts: list[list[int]], device: torch.device) -> Tensor:
    """Rows of two parts of each rank, rank after rank -> bool [M]: the row is of its rank's first part."""
    lengths = torch.tensor(counts, device=device).flatten()
    return torch.tensor([True, False], device=device).repeat(len(counts)).repeat_interleave(lengths)


def _pack_choices(choices: Tensor, valid: Tensor, width: int) -> Tensor:
    """choices [M, K, H], of which at most `width` per token are valid -> the valid ones first, [M, width, H]."""
    order = torch.argsort(valid.int(), dim=1, descending=True, stable=True)[:, :width]
    return choices.gather(1, order.unsqueeze(-1).expand(-1, -1, choices.shape[2]))
