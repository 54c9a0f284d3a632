"""Grouped products equal a loop over experts in both layouts, whatever the counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.kernels.grouped_gemm import MAX_BATCHED_ROWS, grouped_gemm_contiguous, grouped_gemm_masked

FEW_OR_MANY = st.integers(0, 9) | st.sampled_from([0, MAX_BATCHED_ROWS, MAX_BATCHED_ROWS + 1])


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(FEW_OR_MANY, min_size=1, max_size=8), transposed=st.booleans(), seed=st.integers(0, 2**31))
def test_contiguous_equals_a_loop_over_experts_however_weights_lie_in_memory(
    counts: list[int], transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), 7, generator=generator)
    weight = torch.randn(len(counts), 5, 7, generator=generator)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    out = grouped_gemm_contiguous(x, weight, counts)
    expert_of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    expected = [weight[expert].double() @ row.double() for row, expert in zip(x, expert_of_row, strict=True)]
    assert out.shape == (sum(counts), 5)
    if expected:
        torch.testing.assert_close(out.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=8), spare=st.integers(0, 2), seed=st.integers(0, 2**31))
def test_masked_equals_a_loop_over_experts_in_its_valid_rows(counts: list[int], spare: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(counts), max(counts) + spare, 7, generator=generator)
    weight = torch.randn(len(counts), 5, 7, generator=generator)
    out = grouped_gemm_masked(x, weight, torch.tensor(counts))
    assert out.shape == (*x.shape[:2], 5)
    for expert, count in enumerate(counts):
        expected = x[expert, :count].double() @ weight[expert].double().t()
        torch.testing.assert_close(out[expert, :count].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [[2, 2], [3], [1, 1, 1]])
def test_counts_that_do_not_fit_are_refused_with_the_numbers(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{len(counts)} counts with sum {sum(counts)}"):
        grouped_gemm_contiguous(torch.zeros(3, 4), torch.zeros(2, 4, 4), counts)
