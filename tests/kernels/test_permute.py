"""Tokens to expert rows and back: every choice has its own row, in expert order, and comes back from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.permute import RowMap, contiguous_map, from_rows, masked_map, to_rows, weighted_sum

HIDDEN = 5


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(local expert ids [T, K] with -1 for choices elsewhere and no expert twice in a token, number of experts)."""
    num_experts = draw(st.integers(1, 9))
    num_tokens = draw(st.integers(0, 12))
    topk = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pool = num_experts + topk
    ids = torch.stack([torch.randperm(pool, generator=generator)[:topk] for _ in range(num_tokens)] or [torch.empty(0, topk)])
    ids = ids.view(num_tokens, topk).long()
    return torch.where(ids < num_experts, ids, -1), num_experts


def _rows_of(row_map: RowMap) -> Tensor:
    return row_map.row[row_map.valid]


def _check_common(ids: Tensor, num_experts: int, row_map: RowMap) -> None:
    assert torch.equal(row_map.valid, ids >= 0)
    rows = _rows_of(row_map)
    assert len(rows.unique()) == len(rows), "two choices share a row"
    assert ((rows >= 0) & (rows < row_map.num_rows)).all()
    assert row_map.counts.tolist() == [int((ids == expert).sum()) for expert in range(num_experts)]


def _check_round_trip(ids: Tensor, row_map: RowMap) -> None:
    hidden = torch.randn(ids.shape[0], HIDDEN, generator=torch.Generator().manual_seed(0))
    rows = to_rows(hidden, row_map)
    assert rows.shape == (row_map.num_rows, HIDDEN)
    back = from_rows(rows, row_map)
    assert torch.equal(back, hidden.unsqueeze(1) * (ids >= 0).unsqueeze(-1))
    unused = torch.ones(row_map.num_rows, dtype=torch.bool)
    unused[_rows_of(row_map)] = False
    assert (rows[unused] == 0).all()


@settings(max_examples=60, deadline=None)
@given(choices=choices(), alignment=st.sampled_from([1, 2, 7, 128]))
def test_contiguous_rows_are_sorted_by_expert_aligned_and_come_back(choices: tuple[Tensor, int], alignment: int) -> None:
    ids, num_experts = choices
    row_map, padded = contiguous_map(ids, num_experts, alignment)
    _check_common(ids, num_experts, row_map)
    _check_round_trip(ids, row_map)
    assert row_map.num_rows == sum(padded)
    start = 0
    for expert, room in enumerate(padded):
        count = int((ids == expert).sum())
        assert start % alignment == 0
        assert count <= room < count + alignment
        assert row_map.row[ids == expert].tolist() == list(range(start, start + count)), "token order within the expert"
        start += room


@settings(max_examples=60, deadline=None)
@given(choices=choices(), spare=st.integers(0, 3))
def test_masked_rows_lie_first_in_their_experts_block_and_come_back(choices: tuple[Tensor, int], spare: int) -> None:
    ids, num_experts = choices
    room = ids.shape[0] + spare
    row_map = masked_map(ids, num_experts, room)
    _check_common(ids, num_experts, row_map)
    _check_round_trip(ids, row_map)
    assert row_map.num_rows == num_experts * room
    for expert in range(num_experts):
        count = int((ids == expert).sum())
        assert row_map.row[ids == expert].tolist() == list(range(expert * room, expert * room + count))


def test_all_tokens_to_one_expert_fill_only_its_block() -> None:
    ids = torch.full((6, 1), 2)
    row_map, padded = contiguous_map(ids, 4, 4)
    assert padded == [0, 0, 8, 0]
    assert row_map.row.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert masked_map(ids, 4, 6).row.flatten().tolist() == [12, 13, 14, 15, 16, 17]


def test_choices_elsewhere_have_no_row_and_come_back_as_zero() -> None:
    ids = torch.full((3, 2), -1)
    row_map, padded = contiguous_map(ids, 2, 128)
    assert padded == [0, 0]
    assert torch.equal(from_rows(torch.empty(0, HIDDEN), row_map), torch.zeros(3, 2, HIDDEN))
    assert torch.equal(from_rows(torch.full((6, HIDDEN), torch.nan), masked_map(ids, 2, 3)), torch.zeros(3, 2, HIDDEN))


@settings(max_examples=25, deadline=None)
@given(num_tokens=st.integers(0, 8), topk=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_the_weighted_sum_equals_float64(num_tokens: int, topk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(num_tokens, topk, HIDDEN, generator=generator)
    weights = torch.rand(num_tokens, topk, generator=generator)
    expected = (outputs.double() * weights.double().unsqueeze(-1)).sum(1)
    torch.testing.assert_close(weighted_sum(outputs, weights).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_weighted_sum_of_bfloat16_is_taken_in_fp32() -> None:
    """256 ones and a hundred small values: a bfloat16 running sum would lose all of the small ones."""
    outputs = torch.ones(1, 101, 1, dtype=torch.bfloat16)
    outputs[0, 0] = 256.0
    total = weighted_sum(outputs, torch.full((1, 101), 0.5))
    assert total.dtype == torch.bfloat16
    assert total.item() == pytest.approx(178.0)
