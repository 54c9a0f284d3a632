"""Shares, step times and launch orders of a trace, against counting nanosecond by nanosecond."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.overlap.timeline_figures import (
    Launch,
    exposed,
    hidden_share,
    idle_share,
    longest_waits,
    step_times_ns,
    submitted_before,
)
from moesaic.overlap.timeline_report import report_json, timeline_report
from moesaic.overlap.trace import BadTrace, Row, Span, Trace, merge


def span(row: Row, start: int, end: int, *, rank: int = 0, name: str = "x", micro_batch: int = 0, step: int | None = 0) -> Span:
    return Span(row=row, name=name, rank=rank, start_ns=start, end_ns=end, micro_batch=micro_batch, step=step)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    rows = st.sampled_from(("step", "cpu", "wait", "computation", "communication"))
    edges = st.tuples(st.integers(0, 25), st.integers(0, 25)).map(sorted)
    spans = draw(st.lists(st.tuples(rows, edges, st.integers(0, 2)), max_size=14))
    return Trace(tuple(span(row, start, end, rank=rank) for row, (start, end), rank in spans))


def points(trace: Trace, row: Row, rank: int) -> set[int]:
    return {at for each in trace.row(row) if each.rank == rank for at in range(each.start_ns, each.end_ns)}


@given(traces())
def test_the_hidden_share_is_the_share_of_points(trace: Trace) -> None:
    hidden = sum(len(points(trace, "communication", rank) & points(trace, "computation", rank)) for rank in trace.ranks)
    whole = sum(len(points(trace, "communication", rank)) for rank in trace.ranks)
    assert hidden_share(trace) == (hidden / whole if whole else None)
    bare = sum(end - start for rank in trace.ranks for start, end in exposed(trace, rank))
    assert bare == whole - hidden


@given(traces())
def test_the_idle_share_is_the_share_of_points(trace: Trace) -> None:
    idle = whole = 0
    for rank in trace.ranks:
        steps = points(trace, "step", rank)
        if not steps:
            edges = [edge for each in trace.spans if each.rank == rank for edge in each.interval]
            steps = set(range(min(edges), max(edges)))
        idle += len(steps - points(trace, "computation", rank))
        whole += len(steps)
    assert idle_share(trace) == (idle / whole if whole else None)


def test_another_ranks_computation_hides_nothing() -> None:
    trace = Trace((span("communication", 0, 10, rank=0), span("computation", 0, 10, rank=1)))
    assert hidden_share(trace) == 0.0


def test_a_step_lasts_from_the_first_rank_to_the_last() -> None:
    steps = [span("step", 0, 50, step=4), span("step", 5, 60, rank=1, step=4), span("step", 70, 90, step=5)]
    assert step_times_ns(Trace(tuple(steps))) == {4: 60, 5: 20}


def test_the_longest_waits_come_first() -> None:
    waits = [span("wait", 0, 3), span("wait", 10, 30), span("wait", 40, 45)]
    assert [each.duration_ns for each in longest_waits(Trace(tuple(waits)), 2)] == [20, 5]


def launches(*order: tuple[str, int], rank: int = 0, step: int = 0) -> Trace:
    return Trace(
        tuple(
            span("cpu", at * 10, at * 10 + 5, name=name, micro_batch=micro_batch, rank=rank, step=step)
            for at, (name, micro_batch) in enumerate(order)
        )
    )


def test_the_launch_order_is_that_of_submits() -> None:
    trace = launches(("experts", 0), ("dispatch_b", 1))
    assert submitted_before(trace, Launch("experts", 0), Launch("dispatch_b", 1))
    assert not submitted_before(trace, Launch("dispatch_b", 1), Launch("experts", 0))


def test_one_rank_or_step_out_of_order_is_enough() -> None:
    good, bad = (("a", 0), ("b", 1)), (("b", 1), ("a", 0))
    for other in (launches(*bad, rank=1), launches(*bad, step=1)):
        assert not submitted_before(merge([launches(*good), other]), Launch("a", 0), Launch("b", 1))
    assert submitted_before(merge([launches(*good), launches(*good, rank=1)]), Launch("a", 0), Launch("b", 1))


def test_of_an_operation_that_ran_twice_every_time_counts() -> None:
    trace = launches(("a", 0), ("b", 1), ("a", 0))
    assert not submitted_before(trace, Launch("a", 0), Launch("b", 1))
    assert not submitted_before(trace, Launch("b", 1), Launch("a", 0))


def test_a_step_that_ran_straight_says_nothing_about_the_order() -> None:
    trace = merge([launches(("a", 0), ("b", 1)), launches(("b", 0), ("a", 0), step=1)])
    assert submitted_before(trace, Launch("a", 0), Launch("b", 1))


def test_an_operation_that_is_not_there_is_named() -> None:
    trace = launches(("a", 0))
    with pytest.raises(BadTrace, match=r"the trace has no 'gate of layer 9' of micro-batch 1"):
        submitted_before(trace, Launch("a", 0), Launch("gate of layer 9", 1))


def test_a_rank_and_a_step_that_are_not_there_are_named() -> None:
    trace = launches(("a", 0), rank=2, step=3)
    with pytest.raises(BadTrace, match="no rank 0; its ranks are 2"):
        trace.only(rank=0)
    with pytest.raises(BadTrace, match="no step 9; its steps are 3"):
        trace.only(step=9)


def test_the_report_counts_operations_though_waits_cut_them() -> None:
    spans = [
        span("step", 0, 100),
        span("cpu", 0, 40, name="dispatch_b"),
        span("wait", 5, 25, name="dispatch"),
        span("computation", 0, 5, name="dispatch_b"),
        span("computation", 25, 40, name="dispatch_b"),
        span("communication", 0, 20, name="dispatch"),
    ]
    report = timeline_report(Trace(tuple(spans)), source="trace.json")
    dispatch, operation = report.kinds
    assert (dispatch.name, dispatch.count, dispatch.hidden_share) == ("dispatch", 1, 0.25)
    assert (operation.name, operation.count, operation.total_us) == ("dispatch_b", 1, 0.02)
    assert (report.hidden_share, report.idle_share, report.median_step_us) == (0.25, 0.8, 0.1)
    assert report_json(report)["waits"] == [{"title": "dispatch", "rank": 0, "step": 0, "micro_batch": 0, "us": 0.02}]


def test_a_trace_without_operations_has_no_report() -> None:
    with pytest.raises(BadTrace, match=r"idle\.json: the trace holds no operation"):
        timeline_report(Trace(()), source="idle.json")
