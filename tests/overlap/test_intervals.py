"""Interval arithmetic is what counting the points would give."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moesaic.overlap.intervals import Interval, intersect, subtract, total, union

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=10)


def points(intervals: list[Interval]) -> set[int]:
    return {point for start, end in intervals for point in range(start, end)}


def is_set(intervals: list[Interval]) -> bool:
    """Sorted, none empty, none touching."""
    flat = [edge for interval in intervals for edge in interval]
    return flat == sorted(set(flat))


@given(INTERVALS)
def test_union(intervals: list[Interval]) -> None:
    merged = union(intervals)
    assert is_set(merged)
    assert points(merged) == points(intervals)
    assert total(merged) == len(points(intervals))


@given(INTERVALS, INTERVALS)
def test_intersection(first: list[Interval], second: list[Interval]) -> None:
    common = intersect(union(first), union(second))
    assert is_set(common)
    assert points(common) == points(first) & points(second)


@given(INTERVALS, INTERVALS)
def test_difference(first: list[Interval], second: list[Interval]) -> None:
    left = subtract(union(first), union(second))
    assert is_set(left)
    assert points(left) == points(first) - points(second)
