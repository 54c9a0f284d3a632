"""MLA decode on Hopper (DeepSeek-V2, section 2.1.3; split-KV as in Flash-Decoding): all heads of a tile share each latent row.

A sequence's context is cut every `split_tokens`, wherever other sequences are cut: the result of a row depends on that row alone,
not on the batch. A context of one split is written at once; others leave partial sums that a second kernel adds in order.

The latent columns are met in pieces: what is held in registers of one piece is free for the next, so that 64 heads fit beside their
sums without spilling, which is what Hopper's products (wgmma) take. FP8 rows become fp16, which holds them exactly and costs one
instruction for two values (bf16: four); so does a bf16 query then, over a power of two of its own that the scores are given back.
"""

# mypy: disable-error-code="assignment"
# (a tuple of tiles grows by one in every turn)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.checks import FLOATS, INDICES, check_number, check_tensor
from moesaic.kernels.latent_write import check_kv_scale
from moesaic.kernels.quant import FP8
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two

LOG2_E = 1.4426950408889634
LEAST_HEADS, MOST_HEADS = 16, 64
"""Rows of a tile of scores: what a tensor core takes at least, and what fits beside the latent rows without spilling."""
PIECES, LEAST_PIECE = 4, 16


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Heads and context rows of a tile, and how it is computed. Of Triton's stages: with 3, page numbers come a tile ahead of their
    rows, and these a tile ahead of their use; with 5, both two tiles ahead, so that rows have a whole turn of the loop to arrive.
    """

    heads: int
    tokens: int
    num_warps: int
    num_stages: int


def tiling_for(dtype: torch.dtype, pool_dtype: torch.dtype, num_heads: int) -> Tiling:
    """Hopper's tile for the dtypes of query and pool. 64 rows in bf16 leave no room for a third tile of them."""
    least = max(power_of_two(num_heads), LEAST_HEADS)
    if dtype is torch.float32:
        return Tiling(heads=LEAST_HEADS, tokens=16, num_warps=4, num_stages=3)
    few = least == LEAST_HEADS
    tokens, stages = (32 if few else 64, 5) if pool_dtype is FP8 else (64, 3)
    return Tiling(heads=min(least, MOST_HEADS), tokens=tokens, num_warps=4 if few else 8, num_stages=stages)


@triton.jit
def _columns(rows: tl.tensor, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """[N, PADDED] from the pointers rows [N, 1], from column FIRST on, zero past WIDTH; without a mask where none is needed."""
    columns = FIRST + tl.arange(0, PADDED)[None, :]
    if FIRST + PADDED <= WIDTH:
        return tl.load(rows + columns)
    else:  # noqa: RET505  Triton compiles one branch, and needs to see that it is one
        return tl.load(rows + columns, mask=columns < WIDTH, other=0.0)


@triton.jit
def _power_below(values: tl.tensor) -> tl.tensor:
    """The largest power of two that is not above; values fp32, positive and normal."""
    return (values.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _split_kernel(
    query: tl.tensor,
    pool: tl.tensor,
    page_table: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    partial_lse: tl.tensor,
    num_heads: tl.tensor,
    num_pages: tl.tensor,
    num_splits: tl.tensor,
    pool_stride: tl.tensor,
    score_scale: tl.tensor,
    kv_scale: tl.tensor,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    KEY: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    PIECES: tl.constexpr,
    NARROWS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    sequence, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(seq_lens + sequence).to(tl.int32)
    begin = split * SPLIT
    if (begin < length) | (split == 0):
        heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
        PIECE: tl.constexpr = VALUE_PADDED // PIECES
        columns, key_columns = tl.arange(0, PIECE), tl.arange(0, KEY_PADDED)
        own = query + (sequence * num_heads + heads)[:, None] * (VALUE + KEY)
        real = (heads < num_heads)[:, None]
        key_query = tl.load(own + VALUE + key_columns[None, :], mask=real & (key_columns < KEY)[None, :], other=0.0)
        queries, values = (), ()
        for piece in tl.static_range(PIECES):
            place = piece * PIECE + columns
            queries += (tl.load(own + place[None, :], mask=real & (place < VALUE)[None, :], other=0.0),)
            values += (tl.zeros([HEADS, PIECE], dtype=tl.float32),)
        factor = tl.zeros([HEADS], dtype=tl.float32) + score_scale
        if NARROWS:
            key_query = key_query.to(tl.float32)
            size = tl.max(tl.abs(key_query), axis=1)
            for piece in tl.static_range(PIECES):
                size = tl.maximum(size, tl.max(tl.abs(queries[piece].to(tl.float32)), axis=1))
            size = _power_below(tl.maximum(size, 1e-30))
            narrow = ()
            for piece in tl.static_range(PIECES):
                narrow += ((queries[piece].to(tl.float32) / size[:, None]).to(tl.float16),)
            queries, key_query = narrow, (key_query / size[:, None]).to(tl.float16)
            factor *= size
        most = tl.full([HEADS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([HEADS], dtype=tl.float32)
        end = tl.minimum(begin + SPLIT, length)
        for first in range(begin, end, TOKENS):
            tokens = first + tl.arange(0, TOKENS)
            read = tl.minimum(tokens, end - 1)  # past the end, the last row again: its score is struck out below
            page = tl.load(page_table + sequence * num_pages + read // PAGE).to(tl.int64)
            rows = pool + ((page * PAGE + read % PAGE) * pool_stride)[:, None]
            key = _columns(rows + VALUE, 0, KEY, KEY_PADDED).to(key_query.dtype)
            scores = tl.dot(key_query, key.T, input_precision=PRECISION)
            latent = ()
            for piece in tl.static_range(PIECES):
                latent += (_columns(rows, piece * PIECE, VALUE, PIECE).to(key_query.dtype),)
                scores = tl.dot(queries[piece], latent[piece].T, scores, input_precision=PRECISION)
            scores = scores * factor[:, None] if NARROWS else scores * score_scale
            scores = tl.where((tokens < end)[None, :], scores, float("-inf"))
            highest = tl.maximum(most, tl.max(scores, axis=1))
            weights = tl.exp2(scores - highest[:, None])
            decay = tl.exp2(most - highest)
            total = total * decay + tl.sum(weights, axis=1)
            added = ()
            for piece in tl.static_range(PIECES):
                before = values[piece] * decay[:, None]
                added += (tl.dot(weights.to(key_query.dtype), latent[piece], before, input_precision=PRECISION),)
            values, most = added, highest
        share = (kv_scale / tl.where(total > 0, total, 1.0))[:, None]
        if length <= SPLIT:
            at = sequence * num_heads + heads
            for piece in tl.static_range(PIECES):
                target = piece * PIECE + columns[None, :]
                result = (values[piece] * share).to(out.dtype.element_ty)
                tl.store(out + at[:, None] * VALUE + target, result, mask=real & (target < VALUE))
        else:
            at = (sequence * num_splits + split) * num_heads + heads
            for piece in tl.static_range(PIECES):
                target = piece * PIECE + columns[None, :]
                tl.store(partial + at[:, None] * VALUE + target, values[piece] * share, mask=real & (target < VALUE))
            tl.store(partial_lse + at, most + tl.log2(total), mask=heads < num_heads)


@triton.jit
def _merge_kernel(
    partial: tl.tensor,
    partial_lse: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    num_heads: tl.tensor,
    num_splits: tl.tensor,
    SPLIT: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
) -> None:
    """Partial results of one head, added in the order of the context by their log-sum-exp (base 2)."""
    sequence, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
    length = tl.load(seq_lens + sequence).to(tl.int32)
    if length > SPLIT:
        columns = tl.arange(0, VALUE_PADDED)
        most, total = float("-inf"), 0.0
        values = tl.zeros([VALUE_PADDED], dtype=tl.float32)
        for split in range(tl.cdiv(length, SPLIT)):
            at = (sequence * num_splits + split) * num_heads + head
            own = tl.load(partial_lse + at)
            highest = tl.maximum(most, own)
            decay, weight = tl.exp2(most - highest), tl.exp2(own - highest)
            values = values * decay + weight * tl.load(partial + at * VALUE + columns, mask=columns < VALUE, other=0.0)
            total = total * decay + weight
            most = highest
        place = out + (sequence * num_heads + head) * VALUE + columns
        tl.store(place, (values / total).to(out.dtype.element_ty), mask=columns < VALUE)


def mla_decode(
    query: Tensor,
    pool_rows: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
    value_dim: int,
    scale: float,
    split_tokens: int,
    kv_scale: float = 1.0,
    tiling: Tiling | None = None,
) -> Tensor:
    """As `kernels.mla_decode.mla_decode`; `tiling` is for benchmarks that compare."""
    _check(query, pool_rows, page_table, seq_lens, page_size, value_dim, split_tokens)
    check_kv_scale("mla_decode", kv_scale, pool_rows)
    num_rows, num_heads, width = query.shape
    out = query.new_empty(num_rows, num_heads, value_dim)
    if not out.numel():
        return out
    num_splits = max(ceil_div(page_table.shape[1] * page_size, split_tokens), 1)
    kept = num_splits if num_splits > 1 else 0
    partial = query.new_empty(num_rows, kept, num_heads, value_dim, dtype=torch.float32)
    partial_lse = query.new_empty(num_rows, kept, num_heads, dtype=torch.float32)
    is_wide, is_fp8 = query.dtype is torch.float32, pool_rows.dtype is FP8
    tiling = tiling or tiling_for(query.dtype, pool_rows.dtype, num_heads)
    padded = max(power_of_two(value_dim), PIECES * LEAST_PIECE)
    sizes: dict[str, Any] = {"SPLIT": split_tokens, "VALUE": value_dim, "VALUE_PADDED": padded}
    shared: dict[str, Any] = {
        "seq_lens": seq_lens,
        "out": out,
        "partial": partial,
        "partial_lse": partial_lse,
        "num_heads": num_heads,
    }
    launch(
        _split_kernel,
        (ceil_div(num_heads, tiling.heads), num_rows, num_splits),
        **shared,
        **sizes,
        query=query,
        pool=pool_rows,
        page_table=page_table,
        num_pages=page_table.shape[1],
        num_splits=num_splits,
        pool_stride=pool_rows.stride(0),
        score_scale=scale * kv_scale * LOG2_E,
        kv_scale=kv_scale,
        PAGE=page_size,
        KEY=width - value_dim,
        KEY_PADDED=max(power_of_two(width - value_dim), 16),
        HEADS=tiling.heads,
        TOKENS=tiling.tokens,
        PIECES=PIECES,
        NARROWS=is_fp8 and query.dtype is torch.bfloat16,
        PRECISION="ieee" if is_wide else "tf32",
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    if num_splits > 1:
        launch(_merge_kernel, (num_heads, num_rows), **shared, **sizes, num_splits=num_splits)
    return out


def _check(
    query: Tensor,
    pool_rows: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    value_dim: int,
    split_tokens: int,
) -> None:
    function = "mla_decode"
    check_tensor(function, "query", query, shape=(None, None, None), dtypes=FLOATS, contiguous=True)
    num_rows, _, width = query.shape
    check_tensor(function, "pool_rows", pool_rows, shape=(None, width), dtypes=(query.dtype, FP8), like=query)
    check_tensor(function, "page_table", page_table, shape=(num_rows, None), dtypes=INDICES, like=query, contiguous=True)
    check_tensor(function, "seq_lens", seq_lens, shape=(num_rows,), dtypes=INDICES, like=query)
    check_number(function, "page_size", page_size, at_least=1)
    check_number(function, "value_dim", value_dim, at_least=1, at_most=width - 1)
    check_number(function, "split_tokens", split_tokens, at_least=1)
