"""Replica choice `balanced` on a GPU: every program solves the same small transport problem alone, then serves its own choices.

A program is one warp that keeps loads, shares and the search in registers, so that nothing is exchanged between programs and no
step waits for memory: a value is picked out of a vector by a sum over the warp. The order of every step is the reference's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.balanced_choice import BalancedTable, ChoiceCounts, check_choice
from moesaic.kernels.checks import check_number, check_tensor
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two
from moesaic.kernels.triton.permute import count_chunks

CHUNK = 32
"""Choices of one program: those of four tokens."""
COUNTS_AT_ONCE = 2048
"""Counts that a program loads at once."""


@triton.jit
def _pick(values: tl.tensor, at: tl.tensor) -> tl.tensor:
    """The one value of a vector where `at` is true."""
    return tl.sum(tl.where(at, values, 0), axis=0)


@triton.jit
def _pick_share(shares: tl.tensor, at: tl.tensor) -> tl.tensor:
    """The one value of a matrix where `at` is true."""
    return tl.sum(tl.sum(tl.where(at, shares, 0), axis=1), axis=0)


@triton.jit
def _shed(
    loads: tl.tensor,
    shares: tl.tensor,
    before: tl.tensor,
    by: tl.tensor,
    gpu_of: tl.tensor,
    lanes: tl.tensor,
    rows: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    most: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Shift up to `most` along the path that leads to `target`: (loads, shares, how much)."""
    amount, gpu = most, target
    while gpu != source:
        near, row = _pick(before, lanes == gpu), _pick(by, lanes == gpu)
        amount = tl.minimum(amount, _pick_share(shares, (rows == row) & (gpu_of == near)))
        gpu = near
    gpu = target
    while gpu != source:
        near, row = _pick(before, lanes == gpu), _pick(by, lanes == gpu)
        change = (gpu_of == gpu).to(tl.int32) - (gpu_of == near).to(tl.int32)
        shares += tl.where(rows == row, change * amount, 0)
        gpu = near
    loads += ((lanes == target).to(tl.int32) - (lanes == source).to(tl.int32)) * amount
    return loads, shares, amount


@triton.jit
def _relieve(
    loads: tl.tensor,
    shares: tl.tensor,
    gpu_of: tl.tensor,
    lanes: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    source: tl.tensor,
    limit: tl.tensor,
    MOST: tl.constexpr,
    PAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """One breadth-first search from `source`: (loads, shares, which GPUs were reached, how many)."""
    queue = tl.where(lanes == 0, source, 0)
    before, by = tl.zeros_like(lanes), tl.zeros_like(lanes)
    reached = lanes == source
    seen = (gpu_of == source) | (gpu_of < 0)
    excess = _pick(loads, lanes == source) - limit
    head, num_reached = tl.zeros_like(source), tl.zeros_like(source) + 1
    while (head < num_reached) & (excess > 0):
        near = _pick(queue, lanes == head)
        last = tl.zeros_like(source) - 1
        at_near = gpu_of == near
        while last < PAST:
            can_leave = tl.sum(tl.where(at_near, shares, 0), axis=1) > 0
            is_open = can_leave[:, None] & (~seen) & (places > last)
            last = tl.min(tl.min(tl.where(is_open, places, PAST), axis=1), axis=0)
            if last < PAST:
                far = _pick_share(gpu_of, places == last)
                before, by = tl.where(lanes == far, near, before), tl.where(lanes == far, last // MOST, by)
                queue = tl.where(lanes == num_reached, far, queue)
                reached, seen = reached | (lanes == far), seen | (gpu_of == far)
                num_reached += 1
                room = limit - _pick(loads, lanes == far)
                if room > 0:
                    most = tl.minimum(excess, room)
                    loads, shares, moved = _shed(loads, shares, before, by, gpu_of, lanes, rows, source, far, most)
                    excess -= moved
                    last = tl.where(excess > 0, last, PAST)
        head += 1
    return loads, shares, reached, num_reached


@triton.jit
def _level(
    loads: tl.tensor,
    shares: tl.tensor,
    gpu_of: tl.tensor,
    lanes: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    limit: tl.tensor,
    num_gpus: tl.tensor,
    MOST: tl.constexpr,
    PAST: tl.constexpr,
) -> tl.tensor:
    """The shares when no GPU is above the limit, which rises only where it must. GPUs in falling order of their first loads."""
    order = tl.where(lanes < num_gpus, loads, -1)
    first, source = tl.max(order, axis=0, return_indices=True)
    while first > limit:
        while _pick(loads, lanes == source) > limit:
            loads, shares, reached, num_reached = _relieve(loads, shares, gpu_of, lanes, rows, places, source, limit, MOST, PAST)
            has_room = tl.sum((reached & (loads < limit)).to(tl.int32), axis=0) > 0
            if (_pick(loads, lanes == source) > limit) & (~has_room):
                limit = (_pick(loads, reached) + num_reached - 1) // num_reached
        order = tl.where(lanes == source, -1, order)
        first, source = tl.max(order, axis=0, return_indices=True)
    return shares


@triton.jit
def _shares(
    totals: tl.tensor,
    sum_of_all: tl.tensor,
    fixed_experts: tl.tensor,
    shared_experts: tl.tensor,
    shared_gpus: tl.tensor,
    num_gpus: tl.tensor,
    num_fixed: tl.tensor,
    num_shared: tl.tensor,
    most: tl.tensor,
    GPUS: tl.constexpr,
    FIXED: tl.constexpr,
    SHARED: tl.constexpr,
    MOST: tl.constexpr,
) -> tl.tensor:
    """Tokens of each shared expert per GPU, int32 [SHARED, MOST], from `totals` int32 per expert in memory."""
    lanes, members, choices = tl.arange(0, GPUS), tl.arange(0, FIXED), tl.arange(0, MOST)
    inside = (lanes < num_gpus)[:, None] & (members < num_fixed)[None, :]
    fixed = tl.load(fixed_experts + lanes[:, None] * num_fixed + members[None, :], mask=inside, other=-1)
    loads = tl.sum(tl.load(totals + fixed, mask=fixed >= 0, other=0), axis=1)
    limit = tl.maximum((sum_of_all + num_gpus - 1) // num_gpus, tl.max(loads, axis=0))
    rows = tl.arange(0, SHARED)
    inside = (rows < num_shared)[:, None] & (choices < most)[None, :]
    gpu_of = tl.load(shared_gpus + rows[:, None] * most + choices[None, :], mask=inside, other=-1)
    experts = tl.load(shared_experts + rows, mask=rows < num_shared, other=-1)
    tokens = tl.load(totals + experts, mask=experts >= 0, other=0)
    shares = tl.zeros([SHARED, MOST], dtype=tl.int32)
    for row in range(num_shared):
        own = tl.load(shared_gpus + row * most + choices, mask=choices < most, other=-1)
        is_own = tl.max((own[None, :] == lanes[:, None]).to(tl.int32), axis=1) > 0
        emptiest = tl.argmin(tl.where(is_own, loads, 2147483647), axis=0)
        num_tokens = _pick(tokens, rows == row)
        loads += tl.where(lanes == emptiest, num_tokens, 0)
        shares += tl.where((rows == row)[:, None] & (gpu_of == emptiest), num_tokens, 0)
    places = rows[:, None] * MOST + choices[None, :]
    return _level(loads, shares, gpu_of, lanes, rows[:, None], places, limit, num_gpus, MOST, SHARED * MOST)


@triton.jit(do_not_specialize=["num_choices", "rank"])
def _balanced_kernel(
    topk_ids: tl.tensor,
    before_chunk: tl.tensor,
    counts: tl.tensor,
    chosen: tl.tensor,
    scratch: tl.tensor,
    fixed_experts: tl.tensor,
    shared_experts: tl.tensor,
    shared_gpus: tl.tensor,
    shared_slots: tl.tensor,
    shared_index: tl.tensor,
    first_slots: tl.tensor,
    num_choices: tl.tensor,
    num_ranks: tl.tensor,
    rank: tl.tensor,
    num_experts: tl.tensor,
    num_gpus: tl.tensor,
    num_fixed: tl.tensor,
    num_shared: tl.tensor,
    most: tl.tensor,
    EXPERTS: tl.constexpr,
    RANKS: tl.constexpr,
    GPUS: tl.constexpr,
    FIXED: tl.constexpr,
    SHARED: tl.constexpr,
    MOST: tl.constexpr,
    CHUNK: tl.constexpr,
    ACTIVATED: tl.constexpr,
) -> None:
    chunk = tl.program_id(0).to(tl.int64)
    totals = scratch + chunk * (EXPERTS + SHARED * MOST)
    ends = totals + EXPERTS
    experts, sources = tl.arange(0, EXPERTS), tl.arange(0, RANKS)
    total, before = tl.zeros([EXPERTS], dtype=tl.int32), tl.zeros([EXPERTS], dtype=tl.int32)
    for first in range(0, num_ranks, RANKS):
        source = (first + sources)[:, None]
        inside = (source < num_ranks) & (experts < num_experts)[None, :]
        own = tl.load(counts + source * num_experts + experts[None, :], mask=inside, other=0).to(tl.int32)
        total += tl.sum(own, axis=0)
        before += tl.sum(tl.where(source < rank, own, 0), axis=0)
    if ACTIVATED:
        total = (total > 0).to(tl.int32)
    tl.store(totals + experts, total)
    tl.debug_barrier()
    shares = _shares(
        totals,
        tl.sum(total, axis=0),
        fixed_experts,
        shared_experts,
        shared_gpus,
        num_gpus,
        num_fixed,
        num_shared,
        most,
        GPUS,
        FIXED,
        SHARED,
        MOST,
    )
    rows, choices = tl.arange(0, SHARED), tl.arange(0, MOST)
    tl.debug_barrier()
    tl.store(totals + experts, before)
    tl.store(ends + rows[:, None] * MOST + choices[None, :], tl.cumsum(shares, axis=1))
    tl.debug_barrier()
    lane = tl.arange(0, CHUNK)
    place, other = chunk * CHUNK + lane, chunk * CHUNK + lane
    ids = tl.load(topk_ids + place, mask=place < num_choices, other=-1)
    others = tl.load(topk_ids + other, mask=other < num_choices, other=-1)
    known = ids >= 0
    earlier = (ids[:, None] == others[None, :]) & (lane[None, :] < lane[:, None])
    turn = tl.load(before_chunk + chunk * num_experts + ids, mask=known, other=0) + tl.sum(earlier.to(tl.int32), axis=1)
    turn += tl.load(totals + ids, mask=known, other=0)
    if ACTIVATED:
        turn = tl.zeros_like(turn)  # whoever comes, the expert's one share has room
    shared = tl.load(shared_index + ids, mask=known, other=-1)
    inside = (shared >= 0)[:, None] & (choices < most)[None, :]
    passed = tl.load(ends + shared[:, None] * MOST + choices[None, :], mask=inside, other=2147483647) <= turn[:, None]
    replica = tl.sum(passed.to(tl.int32), axis=1)
    slot = tl.load(shared_slots + shared * most + replica, mask=shared >= 0, other=-1)
    slot = tl.where(shared >= 0, slot, tl.load(first_slots + ids, mask=known, other=-1))
    tl.store(chosen + place, slot.to(tl.int64), mask=place < num_choices)


def count_choices(topk_ids: Tensor, num_experts: int) -> ChoiceCounts:
    """As `kernels.balanced_choice.count_choices`; two kernels."""
    check_tensor("count_choices", "topk_ids", topk_ids, shape=(None, None), dtypes=(torch.int64,), contiguous=True)
    check_number("count_choices", "num_experts", num_experts, at_least=1)
    if not topk_ids.numel():
        empty = topk_ids.new_empty(0, num_experts, dtype=torch.int32)
        return ChoiceCounts(total=topk_ids.new_zeros(num_experts), before=empty)
    before, total = count_chunks(topk_ids, num_experts, CHUNK)
    return ChoiceCounts(total=total, before=before)


def choose_balanced(
    topk_ids: Tensor, own: ChoiceCounts, counts: Tensor, table: BalancedTable, *, rank: int, by_activated: bool = False
) -> Tensor:
    """As `kernels.balanced_choice.choose_balanced`."""
    check_choice(topk_ids, own, counts, table, rank)
    num_ranks, num_experts = counts.shape
    num_chunks = ceil_div(topk_ids.numel(), CHUNK)
    if own.before is None or tuple(own.before.shape) != (num_chunks, num_experts):
        got = None if own.before is None else list(own.before.shape)
        raise ValueError(f"choose_balanced: own.before has shape {got}, wanted {[num_chunks, num_experts]}, as count_choices gives")
    chosen = torch.empty_like(topk_ids)
    num_gpus, num_fixed = table.fixed_experts.shape
    num_shared, most = table.shared_gpus.shape
    sizes = {"EXPERTS": power_of_two(num_experts), "SHARED": power_of_two(num_shared), "MOST": power_of_two(most)}
    room = sizes["EXPERTS"] + sizes["SHARED"] * sizes["MOST"]
    launch(
        _balanced_kernel,
        (num_chunks,),
        topk_ids=topk_ids,
        before_chunk=own.before,
        counts=counts,
        chosen=chosen,
        scratch=topk_ids.new_empty(num_chunks, room, dtype=torch.int32),
        fixed_experts=table.fixed_experts,
        shared_experts=table.shared_experts,
        shared_gpus=table.shared_gpus,
        shared_slots=table.shared_slots,
        shared_index=table.shared_index,
        first_slots=table.first_slots,
        num_choices=topk_ids.numel(),
        num_ranks=num_ranks,
        rank=rank,
        num_experts=num_experts,
        num_gpus=num_gpus,
        num_fixed=num_fixed,
        num_shared=num_shared,
        most=most,
        **sizes,
        RANKS=min(max(COUNTS_AT_ONCE // sizes["EXPERTS"], 1), power_of_two(num_ranks)),
        GPUS=power_of_two(num_gpus),
        FIXED=power_of_two(num_fixed),
        CHUNK=CHUNK,
        ACTIVATED=by_activated,
        num_warps=1,
    )
    return chosen
