"""MLA's two forms against attention written out in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.mla_decode import mla_decode, mla_decode_reference
from moesaic.kernels.mla_prefill import QUERY_BLOCK, causal_attention, mla_prefill, mla_prefill_reference, padded_rows

prefill_module = importlib.import_module("moesaic.kernels.mla_prefill")


def _causal64(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The queries are the last of the positions: one masked softmax over everything."""
    num_queries, length = query.shape[1], key.shape[1]
    scores = query.double() @ key.double().transpose(1, 2) * scale
    last_visible = torch.arange(length - num_queries, length).unsqueeze(1)
    scores = scores.masked_fill(torch.arange(length) > last_visible, float("-inf"))
    return scores.softmax(-1) @ value.double()


def _qkv(heads: int, num_queries: int, prefix: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    length = prefix + num_queries
    return (
        torch.randn(heads, num_queries, 6, generator=generator),
        torch.randn(heads, length, 6, generator=generator),
        torch.randn(heads, length, 4, generator=generator),
    )


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 3),
    num_queries=st.integers(1, 20),
    prefix=st.integers(0, 20),
    block=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_prefill_equals_masked_softmax_for_any_prefix_and_query_block(
    heads: int, num_queries: int, prefix: int, block: int, seed: int
) -> None:
    query, key, value = _qkv(heads, num_queries, prefix, seed)
    with patch.object(prefill_module, "QUERY_BLOCK", block):
        out = causal_attention(query, key, value, scale=0.4)
    torch.testing.assert_close(out.double(), _causal64(query, key, value, 0.4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 37])
def test_prefill_longer_than_the_real_query_block(prefix: int) -> None:
    query, key, value = _qkv(2, QUERY_BLOCK + 11, prefix)
    out = causal_attention(query, key, value, scale=0.4)
    torch.testing.assert_close(out.double(), _causal64(query, key, value, 0.4), rtol=1e-4, atol=1e-5)


def test_prefill_of_no_queries_gives_no_rows() -> None:
    query, key, value = _qkv(2, 0, 5)
    assert causal_attention(query, key, value, scale=1.0).shape == (2, 0, 4)


def _packed(spans: list[tuple[int, int]], heads: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, key, key_rope, value and chunks of (prefix, rows) spans; between the contexts lie rows that belong to nobody."""
    nope, rope, value_dim = 7, 4, 21
    generator = torch.Generator().manual_seed(seed)
    chunks, num_rows, length = [], 0, 0
    for prefix, rows in spans:
        chunks.append((num_rows, rows, length, prefix))
        num_rows, length = num_rows + rows, length + prefix + rows + 3
    key, key_rope = padded_rows(torch.empty(0), heads * nope, length), padded_rows(torch.empty(0), rope, length)
    return (
        torch.randn(num_rows, heads, nope + rope, generator=generator),
        key.copy_(torch.randn(heads * nope, length, generator=generator)).unflatten(0, (heads, nope)),
        key_rope.copy_(torch.randn(rope, length, generator=generator)),
        torch.randn(length, heads, value_dim, generator=generator),
        torch.tensor(chunks),
    )


SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(spans=SPANS, heads=st.integers(1, 3), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("prefill", [mla_prefill_reference, mla_prefill])
def test_packed_chunks_equal_masked_softmax_of_each_alone(
    prefill: Callable[..., Tensor], spans: list[tuple[int, int]], heads: int, seed: int
) -> None:
    query, key, key_rope, value, chunks = _packed(spans, heads, seed)
    out = prefill(query, key, key_rope, value, chunks, scale=0.4)
    for first_row, rows, first_key, prefix in chunks.tolist():
        context = slice(first_key, first_key + prefix + rows)
        own_key = torch.cat([key[:, :, context], key_rope[:, context].expand(heads, -1, -1)], dim=1).transpose(1, 2)
        own_query = query[first_row : first_row + rows].transpose(0, 1)
        expected = _causal64(own_query, own_key, value[context].transpose(0, 1), 0.4)
        own = out[first_row : first_row + rows].transpose(0, 1)
        torch.testing.assert_close(own.double(), expected, rtol=1e-4, atol=1e-5)


def test_keys_and_values_beyond_a_context_never_matter() -> None:
    query, key, key_rope, value, chunks = _packed([(5, 17), (0, 3)], 2, 0)
    before = mla_prefill(query, key, key_rope, value, chunks, scale=0.4)
    for _, rows, first_key, prefix in chunks.tolist():
        gap = slice(first_key + prefix + rows, first_key + prefix + rows + 3)
        key[:, :, gap], key_rope[:, gap], value[gap] = float("nan"), float("nan"), float("nan")
    assert torch.equal(mla_prefill(query, key, key_rope, value, chunks, scale=0.4), before)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=5),
    heads=st.integers(1, 9),
    rank=st.sampled_from([8, 19, 64, 150]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("decode", [mla_decode_reference, mla_decode])
def test_absorbed_decode_equals_materialised_attention(
    decode: Callable[..., torch.Tensor], lengths: list[int], heads: int, rank: int, seed: int
) -> None:
    nope, rope, value_dim, page_size = 6, 4, 5, 4
    generator = torch.Generator().manual_seed(seed)
    num_pages = -(-max(lengths) // page_size) + seed % 2
    width = num_pages * page_size
    query = torch.randn(len(lengths), heads, nope + rope, generator=generator)
    latent = torch.randn(len(lengths), width, rank + rope, generator=generator)
    key_up = torch.randn(heads, nope, rank, generator=generator)
    value_up = torch.randn(heads, value_dim, rank, generator=generator)
    past_end = torch.arange(width) >= torch.tensor(lengths).unsqueeze(1)
    latent[past_end] = torch.nan
    order = torch.randperm(len(lengths) * num_pages, generator=generator)
    pool_rows = torch.empty(len(order), page_size, rank + rope)
    pool_rows[order] = latent.view(-1, page_size, rank + rope)

    absorbed = torch.cat([torch.einsum("bhn,hnr->bhr", query[..., :nope], key_up), query[..., nope:]], dim=-1)
    attended = decode(
        absorbed,
        pool_rows.view(-1, rank + rope),
        order.view(len(lengths), num_pages),
        torch.tensor(lengths),
        page_size=page_size,
        value_dim=rank,
        scale=0.3,
    )
    out = torch.einsum("bhr,hvr->bhv", attended, value_up)

    for row, length in enumerate(lengths):
        context, position = latent[row, :length].double().split([rank, rope], dim=-1)
        key = torch.cat([torch.einsum("lr,hnr->hln", context, key_up.double()), position.expand(heads, -1, -1)], dim=-1)
        value = torch.einsum("lr,hvr->hlv", context, value_up.double())
        expected = _causal64(query[row].unsqueeze(1), key, value, 0.3)[:, 0]
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-4)


def test_decode_of_no_sequences_gives_no_rows() -> None:
    none = torch.empty(0, dtype=torch.long)
    out = mla_decode(torch.empty(0, 2, 6), torch.empty(8, 6), none.view(0, 2), none, page_size=4, value_dim=4, scale=1.0)
    assert out.shape == (0, 2, 4)
