"""MLA prefill on Hopper, in materialised form (FlashAttention-2's loop; Dao, 2023): a tile of a chunk's queries meets its context.

Keys come in two parts, a head's own [128] and the rotary one [64] that all heads share, so that nothing is concatenated. Sums run
over the context in tiles from its beginning: a row's result depends neither on the rows beside it nor on other chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.checks import FLOATS, check_tensor
from moesaic.kernels.gpu import upload
from moesaic.kernels.mla_prefill import CONTEXT_ALIGNMENT, check_part
from moesaic.kernels.triton.launch import launch, power_of_two

LOG2_E = 1.4426950408889634
ROWS, TOKENS = 128, 64
"""Tile of scores: queries and context rows."""
ROWS_FP32, TOKENS_FP32 = 16, 16


@triton.jit
def _attend(
    most: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    query: tl.tensor,
    query_rope: tl.tensor,
    key: tl.tensor,
    key_rope: tl.tensor,
    value: tl.tensor,
    tokens: tl.tensor,
    visible: tl.tensor,
    last: tl.tensor,
    value_stride: tl.tensor,
    score_scale: tl.tensor,
    KEY: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PADDED: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One tile of context rows; `key` and `key_rope` point at the first element of each dimension, `value` at row 0."""
    read = tokens
    if MASKED:
        read = tl.minimum(tokens, last)  # past the end, the last row again: its score is struck out below
    depth, rope_depth, columns = tl.arange(0, KEY_PADDED), tl.arange(0, ROPE_PADDED), tl.arange(0, VALUE_PADDED)
    own = tl.load(key + read[None, :], mask=(depth < KEY)[:, None], other=0.0)
    shared = tl.load(key_rope + read[None, :], mask=(rope_depth < ROPE)[:, None], other=0.0)
    scores = tl.dot(query, own, input_precision=PRECISION)
    scores = tl.dot(query_rope, shared, scores, input_precision=PRECISION) * score_scale
    if MASKED:
        scores = tl.where(tokens[None, :] < visible[:, None], scores, float("-inf"))
    highest = tl.maximum(most, tl.max(scores, axis=1))
    weights = tl.exp2(scores - highest[:, None])
    decay = tl.exp2(most - highest)
    total = total * decay + tl.sum(weights, axis=1)
    rows = value + (read.to(tl.int64) * value_stride)[:, None] + columns[None, :]
    own_values = tl.load(rows, mask=(columns < VALUE)[None, :], other=0.0)
    sums = tl.dot(weights.to(own_values.dtype), own_values, sums * decay[:, None], input_precision=PRECISION)
    return highest, total, sums


@triton.jit
def _prefill_kernel(
    query: tl.tensor,
    key: tl.tensor,
    key_rope: tl.tensor,
    value: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    tiles: tl.tensor,
    num_heads: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    key_head: tl.tensor,
    key_depth: tl.tensor,
    rope_depth: tl.tensor,
    value_row: tl.tensor,
    value_head: tl.tensor,
    score_scale: tl.tensor,
    KEY: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PADDED: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_LSE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    head, tile = tl.program_id(0).to(tl.int64), tiles + tl.program_id(1) * 5
    first_row, num_rows = tl.load(tile), tl.load(tile + 1).to(tl.int32)
    first_key, num_keys = tl.load(tile + 2), tl.load(tile + 3).to(tl.int32)
    seen = tl.load(tile + 4).to(tl.int32)
    if ALIGNED:
        first_key = tl.multiple_of(first_key, 16)  # CONTEXT_ALIGNMENT
    row, columns = tl.arange(0, ROWS), tl.arange(0, VALUE_PADDED)
    depth, turned = tl.arange(0, KEY_PADDED), tl.arange(0, ROPE_PADDED)
    real = row < num_rows
    rows = query + (first_row + row)[:, None] * query_row + head * query_head
    own = tl.load(rows + depth[None, :], mask=real[:, None] & (depth < KEY)[None, :], other=0.0)
    own_rope = tl.load(rows + KEY + turned[None, :], mask=real[:, None] & (turned < ROPE)[None, :], other=0.0)
    keys = key + head * key_head + first_key + depth[:, None].to(tl.int64) * key_depth
    shared_keys = key_rope + first_key + turned[:, None].to(tl.int64) * rope_depth
    values = value + first_key * value_row + head * value_head
    visible = tl.minimum(seen + row, num_keys)
    end = tl.minimum(seen + num_rows - 1, num_keys)
    whole = tl.minimum(seen, num_keys) // TOKENS * TOKENS
    most = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, VALUE_PADDED], dtype=tl.float32)
    for first in range(0, whole, TOKENS):
        most, total, sums = _attend(
            most,
            total,
            sums,
            own,
            own_rope,
            keys,
            shared_keys,
            values,
            first + tl.arange(0, TOKENS),
            visible,
            end - 1,
            value_row,
            score_scale,
            KEY,
            KEY_PADDED,
            ROPE,
            ROPE_PADDED,
            VALUE,
            VALUE_PADDED,
            PRECISION,
            MASKED=False,
        )
    for first in range(whole, end, TOKENS):
        most, total, sums = _attend(
            most,
            total,
            sums,
            own,
            own_rope,
            keys,
            shared_keys,
            values,
            first + tl.arange(0, TOKENS),
            visible,
            end - 1,
            value_row,
            score_scale,
            KEY,
            KEY_PADDED,
            ROPE,
            ROPE_PADDED,
            VALUE,
            VALUE_PADDED,
            PRECISION,
            MASKED=True,
        )
    place = (first_row + row) * num_heads + head
    divisor = tl.where(total > 0, total, 1.0)
    result = sums / divisor[:, None]
    inside = real[:, None] & (columns < VALUE)[None, :]
    tl.store(out + place[:, None] * VALUE + columns[None, :], result.to(out.dtype.element_ty), mask=inside)
    if HAS_LSE:
        tl.store(lse + place, (most + tl.log2(divisor)) * 0.6931471805599453, mask=real)


def mla_prefill(query: Tensor, key: Tensor, key_rope: Tensor, value: Tensor, chunks: Tensor, *, scale: float) -> Tensor:
    """As `kernels.mla_prefill.mla_prefill`; rows without a chunk are unspecified."""
    check_tensor("mla_prefill", "chunks", chunks, shape=(None, 4), dtypes=(torch.int64,), like=torch.empty(0))
    first_row, num_rows, first_key, prefix = chunks.unbind(1)
    spans = torch.stack([first_row, num_rows, first_key, prefix + num_rows, prefix], dim=1)
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    _launch("mla_prefill", query, key, key_rope, value, spans, scale, out, None)
    return out


def mla_prefill_part(
    query: Tensor, key: Tensor, key_rope: Tensor, value: Tensor, spans: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """As `kernels.mla_prefill.mla_prefill_part`."""
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    _launch("mla_prefill_part", query, key, key_rope, value, spans, scale, out, lse)
    return out, lse


def _launch(
    function: str,
    query: Tensor,
    key: Tensor,
    key_rope: Tensor,
    value: Tensor,
    spans: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    check_tensor(function, "query", query, shape=(None, None, None), dtypes=FLOATS)
    check_part(function, query, key, key_rope, value=value, spans=spans)
    num_heads, depth, rope_dim, value_dim = key.shape[0], key.shape[1], key_rope.shape[0], value.shape[2]
    is_wide = query.dtype is torch.float32
    tiles = _tiles(spans, ROWS_FP32 if is_wide else ROWS)
    sizes: dict[str, Any] = {
        "KEY": depth,
        "KEY_PADDED": max(power_of_two(depth), 16),
        "ROPE": rope_dim,
        "ROPE_PADDED": max(power_of_two(rope_dim), 16),
        "VALUE": value_dim,
        "VALUE_PADDED": max(power_of_two(value_dim), 16),
        "ROWS": ROWS_FP32 if is_wide else ROWS,
        "TOKENS": TOKENS_FP32 if is_wide else TOKENS,
    }
    launch(
        _prefill_kernel,
        (num_heads, len(tiles)),
        query=query,
        key=key,
        key_rope=key_rope,
        value=value,
        out=out,
        lse=lse,
        tiles=upload(tiles, query.device),
        num_heads=num_heads,
        query_row=query.stride(0),
        query_head=query.stride(1),
        key_head=key.stride(0),
        key_depth=key.stride(1),
        rope_depth=key_rope.stride(0),
        value_row=value.stride(0),
        value_head=value.stride(1),
        score_scale=scale * LOG2_E,
        **sizes,
        PRECISION="ieee" if is_wide else "tf32",
        HAS_LSE=lse is not None,
        ALIGNED=not bool((spans[:, 2] % CONTEXT_ALIGNMENT).any()),
        num_warps=4 if is_wide else 8,
        num_stages=2 if is_wide else 3,
    )


def _tiles(spans: Tensor, rows_at_once: int) -> Tensor:
    """int64 [N, 5], the most work first: first query row, rows, first context row, context rows, how many its first query sees."""
    tiles = [
        (first_row + start, min(rows_at_once, num_rows - start), first_key, num_keys, before + start + 1)
        for first_row, num_rows, first_key, num_keys, before in spans.tolist()
        for start in range(0, num_rows, rows_at_once)
    ]
    tiles.sort(key=lambda tile: -min(tile[3], tile[4]))
    return torch.tensor(tiles, dtype=torch.int64).view(-1, 5)
