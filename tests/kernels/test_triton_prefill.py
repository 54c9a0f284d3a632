"""MLA prefill in Triton is what float64 says, whole or in parts that are merged, and a row never depends on the rows beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_kernels import FLOATS, STEP, on_each_device, random, same_bits, twice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.merge_attention import merge_attention_reference
from moesaic.kernels.mla_prefill import mla_prefill_part_reference
from moesaic.kernels.triton import merge_attention, mla_prefill

SEEDS = st.integers(0, 2**31 - 1)
DTYPES = st.sampled_from(FLOATS)
NAMES = ("query", "key", "key_rope", "value")


def _inputs(
    tokens: int, heads: int, length: int, *, dims: tuple[int, int, int], dtype: torch.dtype, seed: int, device: str
) -> list[Tensor]:
    """query, key, key_rope, value; the keys as rows with room behind them."""
    depth, rope, value = dims
    shapes = [(tokens, heads, depth + rope), (heads, depth, length + 3), (rope, length + 5), (length, heads, value)]
    query, key, key_rope, values = (random(*shape, seed=seed + i, dtype=dtype, device=device) for i, shape in enumerate(shapes))
    return [query, key[:, :, :length], key_rope[:, :length], values]


def _exact(inputs: list[Tensor], spans: list[list[int]], scale: float) -> tuple[Tensor, Tensor]:
    """Row by row in float64."""
    query, key, key_rope, value = (x.double().cpu() for x in inputs)
    out = torch.zeros(*query.shape[:2], value.shape[2], dtype=torch.float64)
    lse = torch.full(query.shape[:2], float("-inf"), dtype=torch.float64)
    for first_row, num_rows, first_key, num_keys, before in spans:
        for row in range(num_rows):
            seen = slice(first_key, first_key + min(num_keys, before + row + 1))
            keys = torch.cat([key[:, :, seen], key_rope[:, seen].expand(key.shape[0], -1, -1)], dim=1)
            scores = torch.einsum("hd,hdl->hl", query[first_row + row], keys) * scale
            if scores.shape[1]:
                out[first_row + row] = torch.einsum("hl,lhv->hv", scores.softmax(-1), value[seen])
                lse[first_row + row] = scores.logsumexp(-1)
    return out, lse


def _spans(chunks: list[tuple[int, int]]) -> tuple[list[list[int]], int, int]:
    """Spans of chunks (rows, cached tokens before them), query rows and context rows in all."""
    spans, rows, keys = [], 0, 0
    for num_rows, prefix in chunks:
        spans.append([rows, num_rows, keys, prefix + num_rows, prefix])
        rows, keys = rows + num_rows, keys + prefix + num_rows
    return spans, rows, keys


def _close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double().cpu(), exact, rtol=8 * STEP[dtype], atol=8 * STEP[dtype])


@on_each_device
@settings(max_examples=6, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.sampled_from([0, 1, 16, 20, 130]), st.sampled_from([0, 1, 16, 64, 100])), max_size=3),
    heads=st.sampled_from([1, 3]),
    dims=st.sampled_from([(8, 4, 8), (24, 2, 20)]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_each_query_meets_its_own_context_up_to_itself(
    *, device: str, chunks: list[tuple[int, int]], heads: int, dims: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    spans, rows, keys = _spans(chunks)
    inputs = _inputs(rows, heads, keys, dims=dims, dtype=dtype, seed=seed, device=device)
    exact, exact_lse = _exact(inputs, spans, 0.3)
    packed = torch.tensor(spans, dtype=torch.int64).view(-1, 5)
    out, lse = twice(lambda: mla_prefill.mla_prefill_part(*inputs, packed, scale=0.3))
    _close(out, exact, dtype)
    _close(lse, exact_lse, torch.float32 if dtype is torch.float32 else torch.bfloat16)
    assert same_bits(mla_prefill.mla_prefill(*inputs, packed[:, [0, 1, 2, 4]], scale=0.3), out)
    reference, reference_lse = mla_prefill_part_reference(*inputs, packed, scale=0.3)
    _close(reference, exact, dtype)
    _close(reference_lse, exact_lse, torch.float32)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_context_in_parts_merges_to_the_whole(device: str, dtype: torch.dtype) -> None:
    """A prefix of 70 tokens in pieces of 32, 32 and 6, then the chunk itself: as a prefix too long for memory is met."""
    spans, rows, keys = _spans([(20, 70)])
    inputs = _inputs(rows, 2, keys, dims=(16, 4, 8), dtype=dtype, seed=3, device=device)
    parts = [[0, 20, 0, 32, 32], [0, 20, 32, 32, 32], [0, 20, 64, 6, 6], [0, 20, 70, 20, 0], [0, 20, 0, 0, 0]]
    results = [mla_prefill.mla_prefill_part(*inputs, torch.tensor([part]), scale=0.3) for part in parts]
    out, lse = results[0]
    for other in results[1:]:
        out, lse = merge_attention.merge_attention(out, lse, *other)
    exact, exact_lse = _exact(inputs, spans, 0.3)
    _close(out, exact, dtype)
    _close(lse, exact_lse, dtype)


@on_each_device
@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(0, 3), heads=st.integers(1, 5), width=st.sampled_from([1, 8, 24, 512]), dtype=DTYPES, seed=SEEDS)
def test_a_merge_weighs_both_parts_and_ignores_what_saw_nothing(
    *, device: str, tokens: int, heads: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    first, second = (random(tokens, heads, width, seed=seed + i, dtype=dtype, device=device) for i in range(2))
    lses = [random(tokens, heads, seed=seed + 2 + i) * 30 for i in range(2)]
    for i, lse in enumerate(lses):
        nothing = torch.rand(tokens, heads, generator=torch.Generator().manual_seed(seed + i)) < 0.3
        lse[nothing] = float("-inf")
        (first, second)[i][nothing.to(device)] = float("nan")
    arguments = (first, lses[0].to(device), second, lses[1].to(device))
    out, lse = twice(lambda: merge_attention.merge_attention(*arguments))
    weights = torch.stack(lses).double().softmax(0).nan_to_num(0)
    parts = torch.stack([first, second]).double().cpu().nan_to_num(0)
    _close(out, (weights.unsqueeze(-1) * parts).sum(0), dtype)
    _close(lse, torch.stack(lses).double().logsumexp(0), torch.float32)
    reference, reference_lse = merge_attention_reference(*arguments)
    _close(reference, (weights.unsqueeze(-1) * parts).sum(0), dtype)
    _close(reference_lse, torch.stack(lses).double().logsumexp(0), torch.float32)


@on_each_device
def test_a_row_depends_neither_on_other_chunks_nor_on_where_its_prompt_is_cut(device: str) -> None:
    inputs = _inputs(150, 2, 150, dims=(16, 4, 8), dtype=torch.bfloat16, seed=5, device=device)
    whole = mla_prefill.mla_prefill(*inputs, torch.tensor([[0, 150, 0, 0]]), scale=0.3)
    cut = mla_prefill.mla_prefill(*inputs, torch.tensor([[0, 33, 0, 0], [33, 117, 0, 33]]), scale=0.3)
    assert same_bits(whole, cut)


@on_each_device
def test_a_row_does_not_depend_on_where_its_context_lies(device: str) -> None:
    """Contexts at multiples of 16 rows are read in another way."""
    query, key, key_rope, value = _inputs(40, 2, 90, dims=(16, 4, 8), dtype=torch.bfloat16, seed=6, device=device)
    moved = [query, *(torch.cat([x[..., -3:], x], dim=-1) for x in (key, key_rope)), torch.cat([value[-3:], value])]
    aligned = mla_prefill.mla_prefill(query, key, key_rope, value, torch.tensor([[0, 40, 0, 50]]), scale=0.3)
    assert same_bits(mla_prefill.mla_prefill(*moved, torch.tensor([[0, 40, 3, 50]]), scale=0.3), aligned)


@on_each_device
def test_deepseeks_own_head(device: str) -> None:
    spans, rows, keys = _spans([(130, 70)])
    inputs = _inputs(rows, 1, keys, dims=(128, 64, 128), dtype=torch.bfloat16, seed=7, device=device)
    out = mla_prefill.mla_prefill(*inputs, torch.tensor(spans)[:, [0, 1, 2, 4]], scale=0.1)
    _close(out, _exact(inputs, spans, 0.1)[0], torch.bfloat16)


def _prefill(**changes: Any) -> object:
    arguments = dict(zip(NAMES, _inputs(2, 2, 3, dims=(4, 2, 4), dtype=torch.float32, seed=0, device="cpu"), strict=True))
    arguments["spans"] = torch.tensor([[0, 2, 0, 3, 1]])
    return mla_prefill.mla_prefill_part(**(arguments | changes), scale=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _prefill(query=torch.ones(2, 6)), r"query has shape \[2, 6\]"),
        (lambda: _prefill(query=torch.ones(2, 2, 6).double()), "query is float64, wanted bfloat16"),
        (lambda: _prefill(key_rope=torch.ones(3, 3)), r"key_rope has shape \[3, 3\], wanted \[2, 3\]"),
        (lambda: _prefill(value=torch.ones(3, 2, 4).half()), "value is float16, wanted float32"),
        (lambda: _prefill(spans=torch.tensor([[0, 2, 0, 4, 1]])), r"spans has \[0, 2, 0, 4, 1\], wanted rows among 2 and context"),
        (lambda: _prefill(spans=torch.tensor([[0, 2, 0, 3]])), r"spans has shape \[1, 4\], wanted \[any, 5\]"),
        (
            lambda: merge_attention.merge_attention(torch.ones(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1, 2), torch.ones(1, 1)),
            r"second has shape \[1, 1, 2\], wanted \[1, 1, 1\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
