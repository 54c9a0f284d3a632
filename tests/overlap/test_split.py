"""A batch is cut where its tokens balance, and its fields follow from the axes they declare, or the class is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joined_halves import join_row_ids
from torch import Tensor

from moesaic.overlap.split import split_batch, split_row, splittable

CHUNKS = st.lists(st.integers(1, 300), max_size=8)


@pytest.mark.parametrize(("num_decode", "cut"), [(2, 1), (3, 1), (64, 32), (65, 32)])
def test_decode_is_cut_at_half_its_sequences(num_decode: int, cut: int) -> None:
    assert split_row(num_decode, [], 0.48) == cut


@pytest.mark.parametrize(
    ("chunks", "cut"),
    [
        ([10, 10], 10),
        ([50, 50, 100], 100),
        ([5, 30, 34, 1], 35),
        ([52, 48], 52),
        ([1, 1, 1], 1),
    ],
)
def test_prefill_is_cut_at_the_sequence_boundary_that_balances_best(chunks: list[int], cut: int) -> None:
    assert split_row(0, chunks, 0.48) == cut


@pytest.mark.parametrize("chunks", [[101], [53, 47], [47, 53], [10, 80, 10]])
def test_a_smaller_side_under_the_threshold_is_refused_and_a_sequence_cut_in_half(chunks: list[int]) -> None:
    assert split_row(0, chunks, 0.48) == sum(chunks) // 2


def test_the_threshold_is_a_share_of_the_tokens() -> None:
    assert split_row(0, [30, 70], 0.3) == 30
    assert split_row(0, [30, 70], 0.31) == 50


def test_threshold_zero_never_cuts_inside_a_sequence() -> None:
    assert split_row(0, [1, 999], 0.0) == 1
    assert split_row(0, [1000], 0.0) is None


def test_of_two_equal_boundaries_the_earlier_is_taken() -> None:
    assert split_row(0, [10, 20, 10], 0.2) == 10


@pytest.mark.parametrize(
    ("num_decode", "chunks", "cut"),
    [
        (64, [64], 64),
        (100, [10], 55),
        (4, [96], 50),
        (4, [46, 50], 50),
        (1, [1], 1),
    ],
)
def test_a_mixed_step_balances_tokens_too(num_decode: int, chunks: list[int], cut: int) -> None:
    assert split_row(num_decode, chunks, 0.48) == cut


@pytest.mark.parametrize(("num_decode", "chunks"), [(0, []), (1, []), (0, [1])])
def test_fewer_than_two_rows_cannot_be_split(num_decode: int, chunks: list[int]) -> None:
    assert split_row(num_decode, chunks, 0.48) is None


@given(num_decode=st.integers(0, 300), chunks=CHUNKS)
def test_both_sides_get_their_share_of_any_batch_of_two_rows(num_decode: int, chunks: list[int]) -> None:
    num_rows = num_decode + sum(chunks)
    cut = split_row(num_decode, chunks, 0.48)
    if num_rows < 2:
        assert cut is None
        return
    assert cut is not None
    assert min(cut, num_rows - cut) >= min(0.48 * num_rows, num_rows // 2)


@given(num_decode=st.integers(0, 40), chunks=CHUNKS)
def test_no_boundary_balances_better_than_the_chosen_one(num_decode: int, chunks: list[int]) -> None:
    lengths = [1] * num_decode + chunks
    boundaries = [sum(lengths[:end]) for end in range(1, len(lengths))]
    cut = split_row(num_decode, chunks, 0.0)
    assert (cut is None) == (not boundaries)
    if cut is not None:
        assert cut in boundaries
        assert abs(2 * cut - sum(lengths)) == min(abs(2 * row - sum(lengths)) for row in boundaries)


def _split_total(total: int, cut: int) -> tuple[int, int]:
    return min(total, cut), total - min(total, cut)


@dataclass(frozen=True, kw_only=True)
class Inner:
    positions: Tensor = field(metadata={"axis": "rows"})
    num_leading: int = field(metadata={"axis": _split_total})


@splittable
@dataclass(frozen=True, kw_only=True)
class Outer:
    names: tuple[str, ...] = field(metadata={"axis": "rows"})
    inner: Inner = field(metadata={"axis": "batch"})
    wanted: Tensor = field(metadata={"axis": "row_ids"})
    mode: str = field(metadata={"axis": "shared"})
    plan: str = field(metadata={"axis": "given"})


def _outer(**changes: Any) -> Outer:
    inner = Inner(positions=torch.tensor([7, 8, 9, 3]), num_leading=3)
    values = {"names": tuple("abcd"), "inner": inner, "wanted": torch.tensor([3, 0, 1]), "mode": "decode", "plan": "whole"}
    return Outer(**{**values, **changes})


def test_every_field_follows_its_declared_axis() -> None:
    first, second = split_batch(_outer(), 1, plan=("left", "right"))
    assert (first.names, second.names) == (("a",), ("b", "c", "d"))
    assert (first.inner.positions.tolist(), second.inner.positions.tolist()) == ([7], [8, 9, 3])
    assert (first.inner.num_leading, second.inner.num_leading) == (1, 2)
    assert (first.wanted.tolist(), second.wanted.tolist()) == ([0], [2, 0]), "counted from each half's own first row"
    assert first.mode == second.mode == "decode"
    assert (first.plan, second.plan) == ("left", "right")


@pytest.mark.parametrize("cut", range(5))
def test_results_of_wanted_rows_join_in_the_wholes_order(cut: int) -> None:
    """Each row's result is its position, however the cut parts them; sides may be empty."""
    whole = _outer()
    first, second = split_batch(whole, cut, plan=("left", "right"))
    results = [half.inner.positions[half.wanted].unsqueeze(1) for half in (first, second)]
    joined = join_row_ids(results[0], results[1], whole.wanted, cut)
    assert torch.equal(joined, whole.inner.positions[whole.wanted].unsqueeze(1))


@pytest.mark.parametrize("cut", [-1, 5])
def test_a_cut_outside_the_rows_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match=rf"cut {cut} of Outer lies outside its 4 rows"):
        split_batch(_outer(), cut, plan=("left", "right"))


def test_fields_that_disagree_on_the_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"Outer disagree on the number of rows: \{'names': 3, 'inner.positions': 4\}"):
        split_batch(_outer(names=("a", "b", "c")), 1, plan=("left", "right"))


def test_given_values_must_be_handed_over_and_no_others() -> None:
    with pytest.raises(TypeError, match=r"split with both values of \['plan'\], got \[\]"):
        split_batch(_outer(), 1)
    with pytest.raises(TypeError, match=r"got \['mode', 'plan'\]"):
        split_batch(_outer(), 1, plan=("left", "right"), mode=("x", "y"))


def test_a_new_field_without_an_axis_is_an_error_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match=r"Careless.added declares no axis.*rows, row_ids, shared, given, batch or a function"):

        @splittable
        @dataclass(frozen=True)
        class Careless:
            ids: Tensor = field(metadata={"axis": "rows"})
            added: Tensor


@dataclass(frozen=True)
class CarelessInner:
    added: Tensor


def test_a_field_of_an_inner_batch_without_an_axis_is_one_too() -> None:
    with pytest.raises(TypeError, match=r"CarelessInner.added declares no axis"):

        @splittable
        @dataclass(frozen=True)
        class Around:
            inner: CarelessInner = field(metadata={"axis": "batch"})


def test_an_unknown_axis_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Odd.ids declares the axis 'columns'; choose one of rows"):

        @splittable
        @dataclass(frozen=True)
        class Odd:
            ids: Tensor = field(metadata={"axis": "columns"})


def test_a_class_without_dataclass_fields_is_refused() -> None:
    with pytest.raises(TypeError, match="Plain is not a dataclass"):

        @splittable
        class Plain:
            pass


def test_a_subclass_that_was_not_checked_is_refused_at_the_split() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wider(Outer):
        added: int = 0

    wider = Wider(**vars(_outer()))
    with pytest.raises(TypeError, match=r"Wider.added declares no axis"):
        split_batch(wider, 1, plan=("left", "right"))
