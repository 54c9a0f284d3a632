"""Tokens to expert rows and back on a GPU, without atomics: where a choice's row lies follows from counting, never from arrival.

The map takes three kernels: chunks of choices count per expert, each expert's counts are summed over the chunks before, and each
chunk places its choices. Combining adds a token's rows in top-k order in fp32, so it is the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.checks import FLOATS, check_number, check_tensor
from moesaic.kernels.permute import RowMap
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two

CHUNK_ELEMENTS, LONGEST_CHUNK, SHORTEST_CHUNK = 8192, 256, 16
"""A program counts a chunk of choices against all experts in one tile."""
TILE = 1024


@triton.jit(do_not_specialize=["num_choices"])
def _count_kernel(
    topk_ids: tl.tensor,
    chunk_counts: tl.tensor,
    num_choices: tl.tensor,
    num_experts: tl.tensor,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    chunk = tl.program_id(0).to(tl.int64)
    places, experts = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, EXPERTS)
    ids = tl.load(topk_ids + places, mask=places < num_choices, other=-1)
    counts = tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
    tl.store(chunk_counts + chunk * num_experts + experts, counts, mask=experts < num_experts)


@triton.jit(do_not_specialize=["num_chunks"])
def _scan_kernel(
    chunk_counts: tl.tensor, counts: tl.tensor, num_chunks: tl.tensor, num_experts: tl.tensor, CHUNKS: tl.constexpr
) -> None:
    """Each chunk's count becomes the count of the chunks before it."""
    expert = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS)
    places = chunk_counts + chunks.to(tl.int64) * num_experts + expert
    own = tl.load(places, mask=chunks < num_chunks, other=0)
    tl.store(places, tl.cumsum(own, axis=0) - own, mask=chunks < num_chunks)
    tl.store(counts + expert, tl.sum(own, axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["num_choices", "rows_per_expert"])
def _place_kernel(
    topk_ids: tl.tensor,
    chunk_counts: tl.tensor,
    counts: tl.tensor,
    row: tl.tensor,
    elsewhere: tl.tensor,
    tokens: tl.tensor,
    num_choices: tl.tensor,
    num_experts: tl.tensor,
    rows_per_expert: tl.tensor,
    topk: tl.tensor,
    ALIGNMENT: tl.constexpr,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    chunk = tl.program_id(0).to(tl.int64)
    places, experts = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, EXPERTS)
    valid = places < num_choices
    ids = tl.load(topk_ids + places, mask=valid, other=-1)
    hit = (ids[:, None] == experts[None, :]).to(tl.int32)
    if MASKED:
        start = experts.to(tl.int64) * rows_per_expert
        total = num_experts.to(tl.int64) * rows_per_expert
    else:
        used = tl.load(counts + experts, mask=experts < num_experts, other=0)
        room = (used + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        start = tl.cumsum(room, axis=0) - room
        total = tl.sum(room, axis=0)
    before = tl.load(chunk_counts + chunk * num_experts + experts, mask=experts < num_experts, other=0)
    position = tl.cumsum(hit, axis=0) - 1 + (start + before)[None, :]
    found = tl.sum(hit * position, axis=1)
    tl.store(row + places, tl.where(ids < 0, total, found), mask=valid)
    tl.store(elsewhere + places, ids < 0, mask=valid)
    tl.store(tokens + places, places // topk, mask=valid)


def contiguous_map(topk_ids: Tensor, num_experts: int, alignment: int) -> tuple[RowMap, list[int]]:
    """As `kernels.permute.contiguous_map`: waits for the counts."""
    check_number("contiguous_map", "alignment", alignment, at_least=1)
    row, elsewhere, tokens, counts = map_choices("contiguous_map", topk_ids, num_experts, alignment=alignment)
    padded = [ceil_div(count, alignment) * alignment for count in counts.tolist()]
    return _row_map(row, elsewhere, tokens, counts, sum(padded)), padded


def masked_map(topk_ids: Tensor, num_experts: int, rows_per_expert: int) -> RowMap:
    """As `kernels.permute.masked_map`: nothing waits."""
    check_number("masked_map", "rows_per_expert", rows_per_expert, at_least=0)
    row, elsewhere, tokens, counts = map_choices("masked_map", topk_ids, num_experts, rows_per_expert=rows_per_expert)
    return _row_map(row, elsewhere, tokens, counts, num_experts * rows_per_expert)


def _row_map(row: Tensor, elsewhere: Tensor, tokens: Tensor, counts: Tensor, num_rows: int) -> RowMap:
    """The row of a choice elsewhere is num_rows, one past the end."""
    return RowMap(row=row, elsewhere=elsewhere, counts=counts, num_rows=num_rows, tokens=tokens, targets=row.view(-1))


def map_choices(
    function: str, topk_ids: Tensor, num_experts: int, *, alignment: int = 1, rows_per_expert: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row [T, K], elsewhere [T, K], tokens [T * K], counts [E]) of either layout: masked if `rows_per_expert` is given."""
    check_tensor(function, "topk_ids", topk_ids, shape=(None, None), dtypes=(torch.int64,), contiguous=True)
    check_number(function, "num_experts", num_experts, at_least=1)
    row, elsewhere = torch.empty_like(topk_ids), torch.empty_like(topk_ids, dtype=torch.bool)
    tokens = topk_ids.new_empty(topk_ids.numel())
    if not topk_ids.numel():
        return row, elsewhere, tokens, topk_ids.new_zeros(num_experts)
    chunk = min(max(CHUNK_ELEMENTS // power_of_two(num_experts), SHORTEST_CHUNK), LONGEST_CHUNK)
    chunk_counts, counts = count_chunks(topk_ids, num_experts, chunk)
    launch(
        _place_kernel,
        (chunk_counts.shape[0],),
        topk_ids=topk_ids,
        chunk_counts=chunk_counts,
        counts=counts,
        num_choices=topk_ids.numel(),
        num_experts=num_experts,
        row=row,
        elsewhere=elsewhere,
        tokens=tokens,
        rows_per_expert=rows_per_expert or 0,
        topk=topk_ids.shape[1],
        ALIGNMENT=alignment,
        MASKED=rows_per_expert is not None,
        CHUNK=chunk,
        EXPERTS=power_of_two(num_experts),
    )
    return row, elsewhere, tokens, counts


def count_chunks(topk_ids: Tensor, num_experts: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Of choices [T, K], at least one: (int32 [chunks, E], those of each expert in the chunks before, int64 [E], all of them)."""
    num_choices = topk_ids.numel()
    num_chunks = ceil_div(num_choices, chunk)
    chunk_counts = topk_ids.new_empty(num_chunks, num_experts, dtype=torch.int32)
    counts = topk_ids.new_empty(num_experts)
    shared: dict[str, Any] = {"chunk_counts": chunk_counts, "num_experts": num_experts}
    experts = power_of_two(num_experts)
    launch(_count_kernel, (num_chunks,), **shared, topk_ids=topk_ids, num_choices=num_choices, CHUNK=chunk, EXPERTS=experts)
    launch(_scan_kernel, (num_experts,), **shared, counts=counts, num_chunks=num_chunks, CHUNKS=power_of_two(num_chunks))
    return chunk_counts, counts


@triton.jit
def _row_of(row: tl.tensor, elsewhere: tl.tensor, choice: tl.tensor, HAS_ELSEWHERE: tl.constexpr) -> tl.tensor:
    """The row of a choice, -1 where it lies elsewhere."""
    found = tl.load(row + choice)
    if HAS_ELSEWHERE:
        found = tl.where(tl.load(elsewhere + choice) != 0, -1, found)
    return found


@triton.jit
def _scatter_kernel(
    hidden: tl.tensor,
    out: tl.tensor,
    row: tl.tensor,
    elsewhere: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    HAS_ELSEWHERE: tl.constexpr,
    TOPK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Reads a token once, writes it to the rows of all its choices."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    values = tl.load(hidden + token * stride + columns, mask=columns < width)
    for k in tl.static_range(TOPK):
        target = _row_of(row, elsewhere, token * TOPK + k, HAS_ELSEWHERE)
        tl.store(out + target * width + columns, values, mask=(columns < width) & (target >= 0))


@triton.jit
def _gather_kernel(
    rows: tl.tensor,
    out: tl.tensor,
    row: tl.tensor,
    elsewhere: tl.tensor,
    width: tl.tensor,
    HAS_ELSEWHERE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    choice = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    source = _row_of(row, elsewhere, choice, HAS_ELSEWHERE)
    values = tl.load(rows + source * width + columns, mask=(columns < width) & (source >= 0), other=0.0)
    tl.store(out + choice * width + columns, values, mask=columns < width)


@triton.jit
def _combine_kernel(
    rows: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    row: tl.tensor,
    elsewhere: tl.tensor,
    width: tl.tensor,
    HAS_ELSEWHERE: tl.constexpr,
    TOPK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], dtype=tl.float32)
    for k in tl.static_range(TOPK):
        source = _row_of(row, elsewhere, token * TOPK + k, HAS_ELSEWHERE)
        here = (columns < width) & (source >= 0)
        weight = tl.where(source >= 0, tl.load(weights + token * TOPK + k), 0.0)
        total += weight * tl.load(rows + source * width + columns, mask=here, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=columns < width)


def to_rows(hidden: Tensor, row_map: RowMap, *, zero_padding: bool = True) -> Tensor:
    """As `kernels.permute.to_rows`."""
    num_tokens, topk = row_map.row.shape
    check_tensor("to_rows", "hidden", hidden, shape=(num_tokens, None), dtypes=(hidden.dtype,), like=row_map.row)
    width = hidden.shape[1]
    fill = torch.zeros if zero_padding and row_map.targets is not None else torch.empty
    out = fill(row_map.num_rows, width, dtype=hidden.dtype, device=hidden.device)
    if out.numel() and row_map.row.numel():
        tile = min(TILE, power_of_two(width))
        launch(
            _scatter_kernel,
            (num_tokens, ceil_div(width, tile)),
            hidden=hidden,
            out=out,
            row=row_map.row,
            elsewhere=row_map.elsewhere,
            width=width,
            stride=hidden.stride(0),
            HAS_ELSEWHERE=row_map.elsewhere is not None,
            TOPK=topk,
            TILE=tile,
        )
    return out


def from_rows(rows: Tensor, row_map: RowMap) -> Tensor:
    """As `kernels.permute.from_rows`."""
    _check_rows("from_rows", rows, row_map, (rows.dtype,))
    width = rows.shape[1]
    out = rows.new_empty(*row_map.row.shape, width)
    if out.numel():
        tile = min(TILE, power_of_two(width))
        launch(
            _gather_kernel,
            (row_map.row.numel(), ceil_div(width, tile)),
            rows=rows,
            out=out,
            row=row_map.row,
            elsewhere=row_map.elsewhere,
            width=width,
            HAS_ELSEWHERE=row_map.elsewhere is not None,
            TILE=tile,
        )
    return out


def weighted_rows(rows: Tensor, row_map: RowMap, weights: Tensor) -> Tensor:
    """As `kernels.permute.weighted_rows`."""
    _check_rows("weighted_rows", rows, row_map, FLOATS)
    num_tokens, topk = row_map.row.shape
    check_tensor("weighted_rows", "weights", weights, shape=(num_tokens, topk), dtypes=FLOATS, like=rows, contiguous=True)
    width = rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    if out.numel():
        tile = min(TILE, power_of_two(width))
        launch(
            _combine_kernel,
            (num_tokens, ceil_div(width, tile)),
            rows=rows,
            weights=weights,
            out=out,
            row=row_map.row,
            elsewhere=row_map.elsewhere,
            width=width,
            HAS_ELSEWHERE=row_map.elsewhere is not None,
            TOPK=topk,
            TILE=tile,
        )
    return out


def _check_rows(function: str, rows: Tensor, row_map: RowMap, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor(function, "rows", rows, shape=(row_map.num_rows, None), dtypes=dtypes, like=row_map.row, contiguous=True)
