"""MLA prefill in materialised form: keys and values are expanded from the latent, then ordinary causal attention.

The chunks of several prompts are packed: T query rows, L rows of context. `chunks` int64 [S, 4], on the CPU, has for each its
first query row, its number of rows, its first context row and the number of cached tokens before it; a chunk's queries are the
last of its context. `mla_prefill_part` attends to any part of a context and tells how much weight it has, so that parts can be
merged (`merge_attention.py`): how a prefix too long to be expanded at once is met chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.checks import FLOATS, check_tensor
from moesaic.kernels.gpu import uses_triton
from moesaic.kernels.native.library import kernels_for

QUERY_BLOCK = 1024
KEY_PADDING = 16
"""Elements after each row of keys that the native kernel may read (never use): its vectors are at most this long."""

CONTEXT_ALIGNMENT = 16
"""On a device, keys of contexts that all begin at multiples of so many rows are read in vectors and ahead of time, others one by
one: addresses that are no multiples of 16 bytes can't be read otherwise, and a tile that begins before its context would make the
sums of a row depend on where its context lies."""

ROWS_AT_ONCE = 6
"""Queries whose scores the native kernel holds at once, at most (product.h)."""


def mla_prefill(query: Tensor, key: Tensor, key_rope: Tensor, value: Tensor, chunks: Tensor, *, scale: float) -> Tensor:
    """query [T, heads, K + R] (with rotary part), key [heads, K, L] and key_rope [R, L] (shared by the heads), both in the memory
    of `padded_rows`, value [L, heads, V] -> [T, heads, V]. Raises ValueError on a device, where contexts that all begin at
    multiples of 16 rows are faster.
    """
    if uses_triton(query):
        from moesaic.kernels.triton import mla_prefill as device

        return device.mla_prefill(query, key, key_rope, value, chunks, scale=scale)
    heads, depth, length = key.shape
    stride = key.stride(1)
    padded = key.stride(2) == key_rope.stride(1) == 1 and key_rope.stride(0) == stride >= length + KEY_PADDING
    native = kernels_for(query)
    if native is None or not padded or key.stride(0) != depth * stride or not (query.is_contiguous() and value.is_contiguous()):
        return mla_prefill_reference(query, key, key_rope, value, chunks, scale=scale)
    threads, room = torch.get_num_threads(), length + KEY_PADDING
    out = query.new_empty(query.shape[0], heads, value.shape[2])
    scratch = query.new_empty(threads * ROWS_AT_ONCE * room)
    native.mla_prefill(
        query.data_ptr(),
        key.data_ptr(),
        key_rope.data_ptr(),
        stride,
        value.data_ptr(),
        chunks.data_ptr(),
        len(chunks),
        heads,
        depth,
        key_rope.shape[0],
        value.shape[2],
        scale,
        out.data_ptr(),
        scratch.data_ptr(),
        room,
        threads,
    )
    return out


def padded_rows(like: Tensor, num_rows: int, length: int) -> Tensor:
    """Uninitialised [num_rows, length] with room behind each row. Rows lie an odd number of cache lines apart, so that those of one
    column don't compete for the same cache set.
    """
    stride = -(-(length + KEY_PADDING) // (2 * KEY_PADDING)) * 2 * KEY_PADDING + KEY_PADDING
    return like.new_empty(num_rows, stride)[:, :length]


def mla_prefill_reference(query: Tensor, key: Tensor, key_rope: Tensor, value: Tensor, chunks: Tensor, *, scale: float) -> Tensor:
    """The same in torch, any device and dtype, one chunk after the other."""
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    for first_row, num_rows, first_key, prefix in chunks.tolist():
        context = slice(first_key, first_key + prefix + num_rows)
        shared = key_rope[:, context].expand(key.shape[0], -1, -1)
        attended = causal_attention(
            query[first_row : first_row + num_rows].transpose(0, 1),
            torch.cat([key[:, :, context], shared], dim=1).transpose(1, 2),
            value[context].transpose(0, 1),
            scale=scale,
        )
        out[first_row : first_row + num_rows] = attended.transpose(0, 1)
    return out


def mla_prefill_part(
    query: Tensor, key: Tensor, key_rope: Tensor, value: Tensor, spans: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """As `mla_prefill`, over parts of contexts: (out [T, heads, V], lse fp32 [T, heads], natural log of the sum of exp(scores)).

    spans int64 [S, 5], on the CPU: first query row, number of rows, first context row, number of context rows, and how many of
    them come before the first query's own (all of them where the part lies wholly before the queries): query i sees that many
    and i + 1 more, at most all. A row without a span is unspecified; one that sees nothing is 0 with lse -inf. Raises ValueError.
    """
    if uses_triton(query):
        from moesaic.kernels.triton import mla_prefill as device

        return device.mla_prefill_part(query, key, key_rope, value, spans, scale=scale)
    return mla_prefill_part_reference(query, key, key_rope, value, spans, scale=scale)


def mla_prefill_part_reference(
    query: Tensor, key: Tensor, key_rope: Tensor, value: Tensor, spans: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The same in torch, any device and dtype."""
    check_part("mla_prefill_part", query, key, key_rope, value=value, spans=spans)
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    lse = torch.full(query.shape[:2], float("-inf"), dtype=torch.float32, device=query.device)
    shared = key_rope.float().expand(key.shape[0], -1, -1)
    for first_row, num_rows, first_key, num_keys, before in spans.tolist():
        rows, context = slice(first_row, first_row + num_rows), slice(first_key, first_key + num_keys)
        keys = torch.cat([key[:, :, context].float(), shared[:, :, context]], dim=1)
        scores = torch.matmul(query[rows].float().transpose(0, 1), keys) * scale
        seen = before + 1 + torch.arange(num_rows, device=query.device)
        beyond = torch.arange(num_keys, device=query.device) >= seen.unsqueeze(1)
        scores = scores.masked_fill_(beyond, float("-inf"))
        own = scores.logsumexp(-1)
        weights = (scores - own.unsqueeze(-1)).exp().nan_to_num_(0)
        out[rows] = torch.matmul(weights, value[context].float().transpose(0, 1)).transpose(0, 1).to(out.dtype)
        lse[rows] = own.t()
    return out, lse


def check_part(function: str, query: Tensor, key: Tensor, key_rope: Tensor, *, value: Tensor, spans: Tensor) -> None:
    """What `mla_prefill_part` refuses. Raises ValueError."""
    check_tensor(function, "query", query, shape=(None, None, None), dtypes=(*FLOATS, torch.float64))
    num_tokens, heads, width = query.shape
    own = (query.dtype,)
    check_tensor(function, "key", key, shape=(heads, None, None), dtypes=own, like=query)
    depth, length = key.shape[1:]
    check_tensor(function, "key_rope", key_rope, shape=(width - depth, length), dtypes=own, like=query)
    check_tensor(function, "value", value, shape=(length, heads, None), dtypes=own, like=query)
    check_tensor(function, "spans", spans, shape=(None, 5), dtypes=(torch.int64,), like=torch.empty(0))
    for first_row, num_rows, first_key, num_keys, before in spans.tolist():
        inside = first_row >= 0 and num_rows >= 0 and first_row + num_rows <= num_tokens
        if not (inside and first_key >= 0 and num_keys >= 0 and first_key + num_keys <= length and before >= 0):
            got = [first_row, num_rows, first_key, num_keys, before]
            raise ValueError(
                f"{function}: spans has {got}, wanted rows among {num_tokens} and context among {length}, none negative"
            )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """query [heads, T, D], key [heads, L, D], value [heads, L, V] with L >= T -> [heads, T, V].

    The queries are the last T of the L positions. Long chunks run in blocks of queries so that no mask is larger than
    QUERY_BLOCK x L and no block attends beyond its own last position.
    """
    num_queries, length = query.shape[1], key.shape[1]
    prefix = length - num_queries
    blocks = []
    for start in range(0, num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_queries)
        visible = prefix + stop
        mask = torch.ones(stop - start, visible, dtype=torch.bool, device=query.device).tril(prefix + start)
        blocks.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[None, :, start:stop],
                key[None, :, :visible],
                value[None, :, :visible],
                attn_mask=mask,
                scale=scale,
            )[0]
        )
    if not blocks:
        return query.new_empty(*query.shape[:2], value.shape[2])
    return torch.cat(blocks, dim=1) if len(blocks) != 1 else blocks[0]
