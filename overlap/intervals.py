"""Arithmetic on sets of intervals of time. An interval is (start, end), end excluded; a set is sorted and disjoint."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Any intervals as a set; what touches is joined and what is empty is dropped."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersect(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """What is in both sets."""
    common: list[Interval] = []
    at, other = 0, 0
    while at < len(first) and other < len(second):
        start, end = max(first[at][0], second[other][0]), min(first[at][1], second[other][1])
        if start < end:
            common.append((start, end))
        if first[at][1] < second[other][1]:
            at += 1
        else:
            other += 1
    return common


def subtract(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """What is in the first set but not in the second."""
    left: list[Interval] = []
    begin = 0
    for start, end in first:
        while begin < len(second) and second[begin][1] <= start:
            begin += 1
        at, place = start, begin
        while place < len(second) and second[place][0] < end:
            if at < second[place][0]:
                left.append((at, second[place][0]))
            at = max(at, second[place][1])
            place += 1
        if at < end:
            left.append((at, end))
    return left


def total(intervals: Iterable[Interval]) -> int:
    """Summed length."""
    return sum(end - start for start, end in intervals)
