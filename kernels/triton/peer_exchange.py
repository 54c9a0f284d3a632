"""The low-latency exchange on GPUs that see each other's memory: send, signal and receive, for dispatch and for combine.

A send kernel writes rows to their places in other ranks' windows; the signal kernel after it, in stream order, releases a flag at
each rank; receiving programs poll the flags of their own window. Where rows lie follows from counts, never from arrival.
Compiled for Hopper and run in the interpreter, where several ranks are windows of one process; not run on hardware.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.checks import FLOATS, check_number, check_tensor
from moesaic.kernels.peer_exchange import Dispatched, PeerWindow
from moesaic.kernels.quant import FP8, empty_scales
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two
from moesaic.kernels.triton.permute import map_choices
from moesaic.kernels.triton.quant import quantize_tile

ROW_PROGRAMS = 8
"""Programs that share the rows from one rank to one expert."""
TILE = 1024


@triton.jit
def _send_kernel(
    hidden: tl.tensor,
    topk_ids: tl.tensor,
    row: tl.tensor,
    peers: tl.tensor,
    stride: tl.tensor,
    rank: tl.tensor,
    num_ranks: tl.tensor,
    num_local: tl.tensor,
    max_tokens: tl.tensor,
    row_bytes: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOPK: tl.constexpr,
) -> None:
    """Reads and quantises a token once, writes it to all its experts' ranks."""
    token = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    values = tl.load(hidden + token * stride + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tile, scale = quantize_tile(tl.expand_dims(values, 0), 1e-4)
    for k in range(TOPK):
        choice = token * TOPK + k
        expert = tl.load(topk_ids + choice)
        if expert >= 0:
            position = tl.load(row + choice) - expert * max_tokens
            place = ((expert % num_local * num_ranks + rank) * max_tokens + position) * row_bytes
            address = tl.multiple_of(tl.load(peers + expert // num_local) + place, 16)
            target = address.to(tl.pointer_type(tl.float8e4nv))
            tl.store(target + tl.expand_dims(columns, 0), tile, mask=tl.expand_dims(columns < WIDTH, 0))
            scales = (address + WIDTH).to(tl.pointer_type(tl.float32))
            tl.store(scales + blocks[None, :], scale, mask=(blocks * 128 < WIDTH)[None, :])
            tl.store((address + WIDTH + WIDTH // 32).to(tl.pointer_type(tl.int32)), choice.to(tl.int32))


@triton.jit
def _signal_kernel(
    peers: tl.tensor,
    counts: tl.tensor,
    step: tl.tensor,
    counts_at: tl.tensor,
    flags_at: tl.tensor,
    rank: tl.tensor,
    num_ranks: tl.tensor,
    num_local: tl.tensor,
    RANKS: tl.constexpr,
    LOCAL: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
) -> None:
    """Tells every rank that what was written to it before is whole, and how many rows each of its experts got."""
    ranks, local = tl.arange(0, RANKS), tl.arange(0, LOCAL)
    real = ranks < num_ranks
    base = tl.load(peers + ranks, mask=real, other=0)
    if HAS_COUNTS:
        inside = real[:, None] & (local < num_local)[None, :]
        own = tl.load(counts + ranks[:, None] * num_local + local[None, :], mask=inside, other=0)
        target = (base + counts_at + rank * num_local * 4)[:, None] + local[None, :] * 4
        tl.store(target.to(tl.pointer_type(tl.int32)), own.to(tl.int32), mask=inside)
        tl.debug_barrier()
    flags = (base + flags_at + rank * 4).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(flags, tl.load(step) + tl.zeros_like(ranks), mask=real, sem="release", scope="sys")


@triton.jit
def _all_came(
    flags: tl.tensor, late: tl.tensor, step: tl.tensor, num_ranks: tl.tensor, most_polls: tl.tensor, RANKS: tl.constexpr
) -> tl.tensor:
    """Polls until all ranks have signalled this step; false when it gave up, with the first late rank (+ 1) in `late`."""
    ranks = tl.arange(0, RANKS)
    wanted = tl.load(step)
    missing = ranks < num_ranks
    num_missing, polls = tl.sum(missing.to(tl.int32), axis=0), tl.zeros_like(wanted)
    while (num_missing > 0) & (polls < most_polls):
        seen = tl.atomic_add(flags + ranks, tl.zeros_like(ranks), mask=ranks < num_ranks, sem="acquire", scope="sys")
        missing = (ranks < num_ranks) & (seen - wanted < 0)
        num_missing = tl.sum(missing.to(tl.int32), axis=0)
        polls += 1
    if num_missing > 0:
        tl.store(late, 1 + tl.min(tl.where(missing, ranks, RANKS), axis=0))
    tl.debug_barrier()
    return num_missing == 0


@triton.jit
def _receive_kernel(
    rows: tl.tensor,
    row_scales: tl.tensor,
    row_choices: tl.tensor,
    counts: tl.tensor,
    flags: tl.tensor,
    late: tl.tensor,
    step: tl.tensor,
    x: tl.tensor,
    scales: tl.tensor,
    totals: tl.tensor,
    origin: tl.tensor,
    num_ranks: tl.tensor,
    num_local: tl.tensor,
    max_tokens: tl.tensor,
    row_bytes: tl.tensor,
    scale_expert: tl.tensor,
    scale_block: tl.tensor,
    choices_of_rank: tl.tensor,
    most_polls: tl.tensor,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """The rows from one rank to one expert, moved up to where the ranks before end."""
    expert, source = tl.program_id(0).to(tl.int64), tl.program_id(1)
    came = _all_came(flags, late, step, num_ranks, most_polls, RANKS)
    ranks, columns, blocks = tl.arange(0, RANKS), tl.arange(0, WIDTH_PADDED), tl.arange(0, BLOCKS)
    of_rank = tl.load(counts + ranks * num_local + expert, mask=(ranks < num_ranks) & came, other=0)
    start = tl.sum(tl.where(ranks < source, of_rank, 0), axis=0)
    count = tl.sum(tl.where(ranks == source, of_rank, 0), axis=0)
    if (source == 0) & (tl.program_id(2) == 0):
        tl.store(totals + expert, tl.sum(of_rank, axis=0).to(tl.int64))
    for index in range(tl.program_id(2), count, tl.num_programs(2)):
        own = (expert * num_ranks + source) * max_tokens + index
        place = start + index
        target = expert * num_ranks * max_tokens + place
        values = tl.load(rows + own * row_bytes + columns, mask=columns < WIDTH)
        tl.store(x + target * WIDTH + columns, values, mask=columns < WIDTH)
        has_block = blocks * 128 < WIDTH
        scale = tl.load(row_scales + own * (row_bytes // 4) + WIDTH // 4 + blocks, mask=has_block)
        tl.store(scales + expert * scale_expert + blocks * scale_block + place, scale, mask=has_block)
        choice = tl.load(row_choices + own * (row_bytes // 4) + WIDTH // 4 + WIDTH // 128)
        tl.store(origin + target, source * choices_of_rank + choice)


@triton.jit
def _return_kernel(
    expert_rows: tl.tensor,
    counts: tl.tensor,
    origin: tl.tensor,
    peers: tl.tensor,
    room: tl.tensor,
    returned_at: tl.tensor,
    choices_of_rank: tl.tensor,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    ELEMENT_BYTES: tl.constexpr,
) -> None:
    """Each valid row of an expert to its choice's place at the rank that it came from."""
    expert, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH_PADDED)
    for index in range(tl.program_id(1), tl.load(counts + expert).to(tl.int32), tl.num_programs(1)):
        row = expert * room + index
        values = tl.load(expert_rows + row * WIDTH + columns, mask=columns < WIDTH)
        belongs = tl.load(origin + row)
        place = (belongs % choices_of_rank).to(tl.int64) * WIDTH * ELEMENT_BYTES
        address = tl.multiple_of(tl.load(peers + belongs // choices_of_rank) + returned_at + place, 16)
        tl.store(address.to(tl.pointer_type(expert_rows.dtype.element_ty)) + columns, values, mask=columns < WIDTH)


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_kernel(
    returned: tl.tensor,
    topk_ids: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    flags: tl.tensor,
    late: tl.tensor,
    step: tl.tensor,
    num_ranks: tl.tensor,
    num_tokens: tl.tensor,
    most_polls: tl.tensor,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A rank without tokens waits too: its next dispatch may not meet one that is still being read."""
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    came = _all_came(flags, late, step, num_ranks, most_polls, RANKS)
    total = tl.zeros([TILE], dtype=tl.float32)
    for k in tl.static_range(TOPK):
        choice = token * TOPK + k
        is_here = tl.load(topk_ids + choice, mask=token < num_tokens, other=-1) >= 0
        values = tl.load(returned + choice * WIDTH + columns, mask=(columns < WIDTH) & is_here, other=0.0).to(tl.float32)
        total += tl.load(weights + choice, mask=is_here, other=0.0) * values
    total = tl.where(came, total, float("nan"))
    tl.store(out + token * WIDTH + columns, total.to(out.dtype.element_ty), mask=(columns < WIDTH) & (token < num_tokens))


def dispatch_send(hidden: Tensor, topk_ids: Tensor, window: PeerWindow) -> None:
    """hidden [T, H] of the layout's dtype to the windows of its experts: topk_ids int64 [T, K], global slots, distinct, -1 = none.

    Waits for nothing. Every rank calls it in every step, with T = 0 when it is idle. Raises ValueError.
    """
    window.check("dispatch_send")
    layout = window.layout
    check_tensor("dispatch_send", "hidden", hidden, shape=(None, layout.hidden), dtypes=(layout.dtype,), like=window.own)
    check_number("dispatch_send", "the number of tokens", len(hidden), at_least=0, at_most=layout.max_tokens)
    choices = (len(hidden), layout.topk)
    check_tensor("dispatch_send", "topk_ids", topk_ids, shape=choices, dtypes=(torch.int64,), like=window.own, contiguous=True)
    row, _, _, counts = map_choices("dispatch_send", topk_ids, layout.num_experts, rows_per_expert=layout.max_tokens)
    window.step.add_(1)
    launch(
        _send_kernel,
        (len(hidden),),
        hidden=hidden,
        topk_ids=topk_ids,
        row=row,
        peers=window.peers,
        stride=hidden.stride(0),
        rank=window.rank,
        num_ranks=layout.num_ranks,
        num_local=layout.num_local,
        max_tokens=layout.max_tokens,
        row_bytes=layout.row_bytes,
        WIDTH=layout.hidden,
        BLOCKS=power_of_two(layout.num_blocks),
        TOPK=layout.topk,
        num_warps=8,
    )
    _signal(window, counts, operation=0)


def dispatch_receive(window: PeerWindow) -> Dispatched:
    """What this rank's experts got in this step's dispatch, when all ranks have sent theirs. The device waits, not the CPU."""
    window.check("dispatch_receive")
    layout, own = window.layout, window.own
    x = own.new_empty(layout.num_local, layout.room, layout.hidden, dtype=FP8)
    scales = empty_scales(x, mn_major=True)
    counts, origin = own.new_empty(layout.num_local, dtype=torch.int64), own.new_empty(x.shape[:2], dtype=torch.int32)
    words = window.part(0, layout.counts_at // 4, torch.int32)
    launch(
        _receive_kernel,
        (layout.num_local, layout.num_ranks, min(ROW_PROGRAMS, layout.max_tokens)),
        rows=own,
        row_scales=words.view(torch.float32),
        row_choices=words,
        counts=window.part(layout.counts_at, layout.num_experts, torch.int32),
        x=x.view(torch.uint8),
        scales=scales,
        totals=counts,
        origin=origin,
        num_local=layout.num_local,
        max_tokens=layout.max_tokens,
        row_bytes=layout.row_bytes,
        scale_expert=scales.stride(0),
        scale_block=scales.stride(2),
        choices_of_rank=layout.max_tokens * layout.topk,
        WIDTH=layout.hidden,
        WIDTH_PADDED=power_of_two(layout.hidden),
        BLOCKS=power_of_two(layout.num_blocks),
        **_waiting(window, operation=0),
        num_warps=8,
    )
    return Dispatched(x=x, scales=scales, counts=counts, origin=origin)


def combine_send(expert_rows: Tensor, dispatched: Dispatched, window: PeerWindow) -> None:
    """Expert outputs [L, R * T_max, H] of the layout's dtype, rows as in `dispatched`, back to their ranks. Raises ValueError."""
    window.check("combine_send")
    layout = window.layout
    shape = (layout.num_local, layout.room, layout.hidden)
    own = (layout.dtype,)
    check_tensor("combine_send", "expert_rows", expert_rows, shape=shape, dtypes=own, like=window.own, contiguous=True)
    launch(
        _return_kernel,
        (layout.num_local, min(ROW_PROGRAMS * layout.num_ranks, layout.room)),
        expert_rows=expert_rows,
        counts=dispatched.counts,
        origin=dispatched.origin,
        peers=window.peers,
        room=layout.room,
        returned_at=layout.returned_at,
        choices_of_rank=layout.max_tokens * layout.topk,
        WIDTH=layout.hidden,
        WIDTH_PADDED=power_of_two(layout.hidden),
        ELEMENT_BYTES=layout.dtype.itemsize,
    )
    _signal(window, None, operation=1)


def combine_receive(topk_ids: Tensor, weights: Tensor, window: PeerWindow) -> Tensor:
    """The weighted sums [T, H] of what came back for topk_ids int64 [T, K], weights fp32 [T, K]: in fp32 and top-k order.

    NaN where a rank was late. Raises ValueError.
    """
    window.check("combine_receive")
    layout = window.layout
    shape = (None, layout.topk)
    check_tensor("combine_receive", "topk_ids", topk_ids, shape=shape, dtypes=(torch.int64,), like=window.own, contiguous=True)
    check_number("combine_receive", "the number of tokens", len(topk_ids), at_least=0, at_most=layout.max_tokens)
    check_tensor("combine_receive", "weights", weights, shape=topk_ids.shape, dtypes=FLOATS, like=window.own, contiguous=True)
    out = window.own.new_empty(len(topk_ids), layout.hidden, dtype=layout.dtype)
    tile = min(TILE, power_of_two(layout.hidden))
    launch(
        _sum_kernel,
        (max(len(out), 1), ceil_div(layout.hidden, tile)),
        returned=window.part(layout.returned_at, layout.max_tokens * layout.topk * layout.hidden, layout.dtype),
        topk_ids=topk_ids,
        weights=weights,
        out=out,
        num_tokens=len(out),
        WIDTH=layout.hidden,
        TOPK=layout.topk,
        TILE=tile,
        **_waiting(window, operation=1),
    )
    return out


def _signal(window: PeerWindow, counts: Tensor | None, *, operation: int) -> None:
    layout = window.layout
    launch(
        _signal_kernel,
        (1,),
        peers=window.peers,
        counts=counts,
        step=window.step,
        counts_at=layout.counts_at,
        flags_at=layout.flags_at + 4 * layout.num_ranks * operation,
        rank=window.rank,
        num_ranks=layout.num_ranks,
        num_local=layout.num_local,
        RANKS=power_of_two(layout.num_ranks),
        LOCAL=power_of_two(layout.num_local),
        HAS_COUNTS=counts is not None,
    )


def _waiting(window: PeerWindow, *, operation: int) -> dict[str, Any]:
    """What `_all_came` needs."""
    num_ranks = window.layout.num_ranks
    return {
        "flags": window.part(window.layout.flags_at + 4 * num_ranks * operation, num_ranks, torch.int32),
        "late": window.late[operation:],
        "step": window.step,
        "num_ranks": num_ranks,
        "most_polls": window.most_polls,
        "RANKS": power_of_two(num_ranks),
    }
