"""Maps, permutation and combine in Triton equal the reference: the same row for every choice, and sums in top-k order."""

from __future__ import annotations

import pytest
import torch
from device_kernels import FLOATS, STEP, on_each_device, random, same_bits, twice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.permute import (
    RowMap,
    contiguous_map,
    from_rows_reference,
    masked_map_reference,
    to_rows_reference,
    weighted_sum,
)
from moesaic.kernels.triton import permute

SEEDS = st.integers(0, 2**31)
KINDS = st.sampled_from(["mixed", "one expert", "nowhere"])


def _ids(kind: str, tokens: int, topk: int, experts: int, seed: int) -> Tensor:
    if kind == "one expert":
        return torch.full((tokens, topk), experts - 1)
    if kind == "nowhere":
        return torch.full((tokens, topk), -1)
    return torch.randint(-1, experts, (tokens, topk), generator=torch.Generator().manual_seed(seed))


def _same_map(got: RowMap, expected: RowMap) -> None:
    assert got.num_rows == expected.num_rows
    assert torch.equal(got.counts.cpu(), expected.counts.cpu())
    assert torch.equal(got.valid.cpu(), expected.valid.cpu())
    assert torch.equal(got.row.cpu()[got.valid.cpu()], expected.row.cpu()[expected.valid.cpu()])


@on_each_device
@settings(max_examples=25, deadline=None)
@given(
    kind=KINDS,
    tokens=st.integers(0, 60),
    topk=st.integers(1, 9),
    experts=st.sampled_from([1, 3, 8, 40]),
    alignment=st.sampled_from([1, 2, 128]),
    seed=SEEDS,
)
def test_every_choice_has_the_row_that_the_reference_gives_it(
    *, device: str, kind: str, tokens: int, topk: int, experts: int, alignment: int, seed: int
) -> None:
    ids = _ids(kind, tokens, topk, experts, seed)
    got, padded = permute.contiguous_map(ids.to(device), experts, alignment)
    expected, expected_padded = contiguous_map(ids, experts, alignment)
    assert padded == expected_padded
    _same_map(got, expected)
    room = tokens * topk
    _same_map(permute.masked_map(ids.to(device), experts, room), masked_map_reference(ids, experts, room))


@on_each_device
@settings(max_examples=20, deadline=None)
@given(
    kind=KINDS,
    tokens=st.integers(0, 12),
    topk=st.integers(1, 6),
    width=st.sampled_from([1, 5, 64, 1100]),
    dtype=st.sampled_from(FLOATS),
    masked=st.booleans(),
    seed=SEEDS,
)
def test_tokens_go_to_their_rows_and_come_back_weighted(
    *, device: str, kind: str, tokens: int, topk: int, width: int, dtype: torch.dtype, masked: bool, seed: int
) -> None:
    ids = _ids(kind, tokens, topk, 4, seed).to(device)
    row_map = permute.masked_map(ids, 4, tokens * topk) if masked else permute.contiguous_map(ids, 4, 8)[0]
    hidden = random(tokens, width, seed=seed, dtype=dtype, device=device)
    rows = twice(lambda: permute.to_rows(hidden, row_map))
    assert torch.equal(rows, to_rows_reference(hidden, row_map))
    unpadded = twice(lambda: permute.to_rows(hidden, row_map, zero_padding=False))
    filled = row_map.row[row_map.valid]
    assert torch.equal(unpadded[filled], rows[filled])

    rows = random(row_map.num_rows, width, seed=seed + 1, dtype=dtype, device=device)
    assert torch.equal(twice(lambda: permute.from_rows(rows, row_map)), from_rows_reference(rows, row_map))
    weights = random(tokens, topk, seed=seed + 2, device=device)
    combined = twice(lambda: permute.weighted_rows(rows, row_map, weights))
    exact = torch.einsum("tk,tkh->th", weights.double(), from_rows_reference(rows.double(), row_map))
    torch.testing.assert_close(combined.double(), exact, rtol=STEP[dtype], atol=4 * STEP[dtype])
    in_float64 = weighted_sum(from_rows_reference(rows, row_map), weights).double()
    torch.testing.assert_close(in_float64, exact, rtol=STEP[dtype], atol=4 * STEP[dtype])


@on_each_device
def test_a_tokens_sum_is_in_top_k_order_whatever_other_tokens_there_are(device: str) -> None:
    """Large terms that cancel first leave the small one; in another order it would be lost."""
    rows = torch.tensor([[1e8], [-1e8], [1.0]], device=device)
    for order, expected in (([0, 1, 2], 1.0), ([2, 0, 1], 0.0)):
        row = torch.tensor([[2, 2, 2], order, [0, 0, 0]], device=device)
        row_map = RowMap(row=row, elsewhere=None, counts=row[0], num_rows=3, tokens=row, targets=None)
        assert permute.weighted_rows(rows, row_map, torch.ones(3, 3, device=device))[1].item() == expected


@on_each_device
def test_a_token_does_not_depend_on_its_batch(device: str) -> None:
    rows, weights = random(40, 33, seed=0, device=device), random(9, 4, seed=1, device=device)
    row = torch.randperm(36, generator=torch.Generator().manual_seed(2)).view(9, 4).to(device)

    def combine(tokens: slice) -> Tensor:
        part = RowMap(row=row[tokens], elsewhere=None, counts=row[0], num_rows=40, tokens=row, targets=None)
        return permute.weighted_rows(rows, part, weights[tokens])

    assert same_bits(combine(slice(0, 9))[3:6], combine(slice(3, 6)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ids: permute.masked_map(ids.int(), 4, 8), "topk_ids is int32, wanted int64"),
        (lambda ids: permute.masked_map(ids, 0, 8), "num_experts is 0, wanted 1 or more"),
        (lambda ids: permute.contiguous_map(ids, 4, 0), "alignment is 0, wanted 1 or more"),
        (
            lambda ids: permute.to_rows(ids[:1].float(), permute.masked_map(ids, 4, 6)),
            r"hidden has shape \[1, 2\], wanted \[3, any\]",
        ),
        (lambda ids: permute.from_rows(ids.float(), permute.masked_map(ids, 4, 6)), r"rows has shape \[3, 2\], wanted \[24, any\]"),
        (
            lambda ids: permute.weighted_rows(torch.ones(24, 5), permute.masked_map(ids, 4, 6), ids),
            "weights is int64, wanted bfloat16",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 2, dtype=torch.int64))  # type: ignore[operator]
