"""Embedding, greedy and random tokens in Triton: the rows of the table, the first of the largest, the reference's draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_kernels import FLOATS, on_each_device, random, same_bits, twice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.embedding import embed_reference
from moesaic.kernels.random_bits import gumbel_noise, row_keys
from moesaic.kernels.sampling import greedy_tokens_reference, sample_tokens_reference
from moesaic.kernels.triton import embedding, sampling

SEEDS = st.integers(0, 2**31 - 1)
DTYPES = st.sampled_from(FLOATS)


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 6),
    width=st.sampled_from([1, 24, 2050]),
    first_id=st.sampled_from([0, 3]),
    dtype=DTYPES,
    kind=st.sampled_from([torch.int64, torch.int32]),
    seed=SEEDS,
)
def test_an_embedding_is_a_row_of_the_table_or_zero_where_another_rank_has_it(
    *, device: str, tokens: int, width: int, first_id: int, dtype: torch.dtype, kind: torch.dtype, seed: int
) -> None:
    table = random(5, width + 1, seed=seed, dtype=dtype, device=device)[:, :width]
    ids = torch.randint(0, 9, (tokens,), generator=torch.Generator().manual_seed(seed)).to(kind)
    rows = [table[i - first_id] if first_id <= i < first_id + 5 else torch.zeros_like(table[0]) for i in ids.tolist()]
    expected = torch.stack(rows) if rows else table[:0]
    assert torch.equal(twice(lambda: embedding.embed(ids.to(device), table, first_id=first_id)), expected)
    assert torch.equal(embed_reference(ids.to(device), table, first_id=first_id), expected)


@on_each_device
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 4), num_ids=st.sampled_from([1, 2, 100, 9000]), dtype=DTYPES, levels=st.integers(1, 40), seed=SEEDS)
def test_greedy_takes_the_first_of_the_largest(
    *, device: str, rows: int, num_ids: int, dtype: torch.dtype, levels: int, seed: int
) -> None:
    """A few levels only, so that the largest value comes often."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, levels, (rows, num_ids + 1), generator=generator).to(dtype).to(device)[:, :num_ids]
    tokens, best = twice(lambda: sampling.greedy_tokens(logits))
    expected, expected_best = greedy_tokens_reference(logits.cpu())
    assert torch.equal(tokens.cpu(), expected)
    assert torch.equal(best.cpu(), expected_best)
    for row, token in zip(logits.cpu().tolist(), expected.tolist(), strict=True):
        assert token == row.index(max(row))


@on_each_device
def test_a_row_that_is_not_finite_is_seen_in_its_largest(device: str) -> None:
    logits = random(5, 5000, seed=0, device=device)
    logits[0, 4500], logits[1, 3], logits[2], logits[3, 7] = float("nan"), float("inf"), float("-inf"), float("-inf")
    assert sampling.greedy_tokens(logits)[1].isfinite().tolist() == [False, False, False, True, True]
    assert greedy_tokens_reference(logits.cpu())[1].isfinite().tolist() == [False, False, False, True, True]


@on_each_device
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 4), num_ids=st.sampled_from([1, 40, 5000]), dtype=DTYPES, seed=SEEDS)
def test_a_draw_is_the_references_but_for_roundings(*, device: str, rows: int, num_ids: int, dtype: torch.dtype, seed: int) -> None:
    logits = random(rows, num_ids, seed=seed, dtype=dtype, device=device) * 3
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.5])[:rows]
    generator = torch.Generator().manual_seed(seed)
    seeds, positions = (torch.randint(-(2**62), 2**62, (rows,), generator=generator) for _ in range(2))
    arguments = (logits, temperature.to(device), seeds.to(device), positions.to(device))
    tokens = twice(lambda: sampling.sample_tokens(*arguments)).cpu()
    scores = logits.cpu().double() / temperature.clamp(min=1e-6).double().unsqueeze(1)
    scores = torch.where(temperature.unsqueeze(1) > 0, scores + gumbel_noise(row_keys(seeds, positions), num_ids), logits.cpu())
    largest = scores.amax(dim=-1)
    for drawn in (tokens, sample_tokens_reference(logits.cpu(), temperature, seeds, positions)):
        assert (scores.gather(1, drawn.unsqueeze(1)).squeeze(1) >= largest - 1e-4).all()


@on_each_device
def test_draws_follow_the_distribution(device: str) -> None:
    rows = 400
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    seeds, positions = torch.zeros(rows, dtype=torch.int64, device=device), torch.arange(rows, device=device)
    logits, ones = probabilities.log().expand(rows, 4).contiguous().to(device), torch.ones(rows, device=device)
    counts = sampling.sample_tokens(logits, ones, seeds, positions).bincount(minlength=4).cpu().double()
    expected = probabilities * rows
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001


@on_each_device
def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    logits = random(5, 5000, seed=2, dtype=torch.bfloat16, device=device)
    seeds, ones = torch.arange(5, device=device), torch.ones(5, device=device)
    whole = sampling.sample_tokens(logits, ones, seeds, seeds)
    assert same_bits(whole[2:4], sampling.sample_tokens(logits[2:4], ones[2:4], seeds[2:4], seeds[2:4]))


def _sample(logits: Tensor, temperature: Tensor) -> object:
    return sampling.sample_tokens(logits, temperature, torch.zeros(len(logits)).long(), torch.zeros(len(logits)).long())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampling.greedy_tokens(torch.ones(2, 0)), r"logits has shape \[2, 0\], wanted at least one token id"),
        (lambda: sampling.greedy_tokens(torch.ones(2, 2).long()), "logits is int64, wanted"),
        (lambda: _sample(torch.ones(2, 3), torch.ones(3)), r"temperature has shape \[3\], wanted \[2\]"),
        (lambda: embedding.embed(torch.ones(2), torch.ones(2, 3)), "token_ids is float32, wanted int64 or int32"),
        (lambda: embedding.embed(torch.ones(2).long(), torch.ones(2, 3), first_id=-1), "first_id is -1, wanted 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
