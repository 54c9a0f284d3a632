"""A trace survives its file to the nanosecond, in a form that Chrome and Perfetto read; other files are refused by field."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.overlap.trace import ROWS, BadTrace, Span, Trace
from moesaic.overlap.trace_file import load_trace, save_trace, trace_json

YEAR_NS = 365 * 86400 * 10**9
OPTIONAL = st.one_of(st.none(), st.integers(0, 99))
SPANS = st.builds(
    lambda length, start, **fields: Span(start_ns=start, end_ns=start + length, **fields),
    row=st.sampled_from(ROWS),
    name=st.text(max_size=6),
    rank=st.integers(0, 3),
    start=st.integers(0, 60 * 10**9).map(lambda ns: YEAR_NS + ns),
    length=st.integers(0, 10**10),
    layer=OPTIONAL,
    micro_batch=st.one_of(st.none(), st.integers(0, 1)),
    step=OPTIONAL,
)


def by_everything(trace: Trace) -> list[str]:
    return sorted(map(repr, trace.spans))


@given(spans=st.lists(SPANS, max_size=8), unfinished=st.integers(0, 3))
def test_a_trace_comes_back_as_it_was(spans: list[Span], unfinished: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    trace, path = Trace(tuple(spans), unfinished), tmp_path_factory.getbasetemp() / "trace.json"
    save_trace(trace, path)
    again = load_trace(path)
    assert by_everything(again) == by_everything(trace)
    assert again.num_unfinished == unfinished


def test_times_that_microseconds_do_not_hold_exactly_come_back_too(tmp_path: Path) -> None:
    spans = tuple(Span(row="cpu", name="gate", rank=0, start_ns=YEAR_NS + at, end_ns=YEAR_NS + 2 * at) for at in range(5000))
    save_trace(Trace(spans), tmp_path / "trace.json")
    assert {span.interval for span in load_trace(tmp_path / "trace.json").spans} == {span.interval for span in spans}


CLOSE_SPANS = st.builds(
    lambda start, length, micro_batch: Span(
        row="communication", name="x", rank=0, start_ns=start, end_ns=start + length, micro_batch=micro_batch
    ),
    start=st.integers(0, 20),
    length=st.integers(1, 9),
    micro_batch=st.sampled_from((None, 0, 1)),
)


@given(st.lists(CLOSE_SPANS, max_size=10))
def test_no_thread_shows_two_communications_at_once(spans: list[Span]) -> None:
    """The viewers nest what overlaps on a thread, and drop what doesn't nest."""
    events = [event for event in trace_json(Trace(tuple(spans)))["traceEvents"] if event.get("cat") == "communication"]
    for one, other in combinations(events, 2):
        if (one["pid"], one["tid"]) == (other["pid"], other["tid"]):
            first, second = sorted((one, other), key=lambda event: (event["ts"], event["dur"]))
            assert first["ts"] + first["dur"] <= second["ts"] + 1e-4


def test_events_have_what_the_viewers_need() -> None:
    span = Span(row="computation", name="experts", rank=1, start_ns=5_000, end_ns=7_500, layer=3, micro_batch=1, step=9)
    earlier = Span(row="communication", name="dispatch", rank=1, start_ns=4_000, end_ns=6_000, layer=3, micro_batch=0, step=9)
    document = trace_json(Trace((span, earlier)))
    (event,) = [event for event in document["traceEvents"] if event["name"] == "experts"]
    assert event == {
        "ph": "X",
        "name": "experts",
        "cat": "computation",
        "pid": 1,
        "tid": 2,
        "ts": 1.0,
        "dur": 2.5,
        "args": {"layer": 3, "micro_batch": 1, "rank": 1, "step": 9},
    }
    names = {(event["pid"], event["tid"], event["args"]["name"]) for event in document["traceEvents"] if event["ph"] == "M"}
    assert {(1, 0, "rank 1"), (1, 1, "CPU"), (1, 2, "computation"), (1, 3, "communication")} <= names


def written(path: Path, change: dict[str, Any]) -> Path:
    document = trace_json(Trace((Span(row="cpu", name="gate", rank=0, start_ns=0, end_ns=1),)))
    path.write_text(json.dumps(document | change), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"otherData": {"layout": "other"}}, r"otherData.layout is 'other', expected 'moesaic timeline 1'"),
        ({"otherData": None}, r"otherData.layout is None"),
        ({"otherData": {"layout": "moesaic timeline 1", "base_ns": 0}}, "a field 'num_unfinished' is missing"),
        ({"traceEvents": [{"ph": "X", "name": "a"}]}, "a field 'cat' is missing"),
        (
            {"traceEvents": [{"ph": "X", "name": "a", "cat": "gpu", "args": {}}]},
            "event 'a' is of row 'gpu', expected one of step, cpu",
        ),
        ({"traceEvents": 3}, "not iterable"),
    ],
)
def test_another_layout_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match=message):
        load_trace(written(tmp_path / "trace.json", change))


def test_what_is_no_file_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match="no such file"):
        load_trace(tmp_path / "absent.json")
    (tmp_path / "trace.json").write_text("[1,")
    with pytest.raises(BadTrace, match="not JSON"):
        load_trace(tmp_path / "trace.json")
    (tmp_path / "trace.json").write_text("[1]")
    with pytest.raises(BadTrace, match="not a trace of moesaic"):
        load_trace(tmp_path / "trace.json")
