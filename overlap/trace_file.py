"""A trace as a file in Chrome's trace event format, which Perfetto and chrome://tracing open.

A rank is a process. Its threads are the steps, the CPU (waits lie inside operations), computation, and communication, which gets a
thread more for every communication that runs beside another. Every event's `args` hold layer, micro-batch, rank and step; `cat` is
the row. Times are microseconds since `otherData.base_ns`, exact to the nanosecond.
Format: "Trace Event Format", Google, 2016 (complete events `X`, metadata events `M`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moesaic.overlap.trace import ROWS, BadTrace, Row, Span, Trace

_THREADS: dict[Row, tuple[int, str]] = {
    "step": (0, "steps"),
    "cpu": (1, "CPU"),
    "wait": (1, "CPU"),
    "computation": (2, "computation"),
    "communication": (3, "communication"),
}
_LAYOUT = "moesaic timeline 1"


def lanes(spans: Sequence[Span]) -> list[int]:
    """A lane for each of the spans (sorted by start), so that none overlaps another on its lane.

    Micro-batches have lanes of their own, first that of micro-batch 0.
    """
    ends: dict[int | None, list[int]] = {}
    places: list[int] = []
    for span in spans:
        own = ends.setdefault(span.micro_batch, [])
        place = next((place for place, end in enumerate(own) if end <= span.start_ns), len(own))
        own[place:] = [span.end_ns, *own[place + 1 :]]
        places.append(place)
    order = sorted(ends, key=lambda micro_batch: -1 if micro_batch is None else micro_batch)
    first = {micro_batch: sum(len(ends[each]) for each in order[:at]) for at, micro_batch in enumerate(order)}
    return [first[span.micro_batch] + place for span, place in zip(spans, places, strict=True)]


def trace_json(trace: Trace) -> dict[str, Any]:
    """The JSON object of the file."""
    base = min((span.start_ns for span in trace.spans), default=0)
    return {
        "traceEvents": [event for rank in trace.ranks for event in _rank_events(trace.only(rank=rank), rank, base)],
        "displayTimeUnit": "ms",
        "otherData": {"layout": _LAYOUT, "base_ns": base, "num_unfinished": trace.num_unfinished},
    }


def save_trace(trace: Trace, path: str | Path) -> None:
    Path(path).write_text(json.dumps(trace_json(trace), separators=(",", ":")), encoding="utf-8")


def load_trace(path: str | Path) -> Trace:
    """The trace `save_trace` wrote. Raises BadTrace for a file that is absent or of another layout, naming the field."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadTrace(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadTrace(f"{path}: not JSON ({error}); expected a trace written by /start_profile") from error
    other = document.get("otherData") if isinstance(document, dict) else None
    layout = other.get("layout") if isinstance(other, dict) else None
    if not isinstance(other, dict) or layout != _LAYOUT:
        raise BadTrace(f"{path}: otherData.layout is {layout!r}, expected {_LAYOUT!r}: not a trace of moesaic's timeline")
    try:
        base = int(other["base_ns"])
        spans = [_span(event, base) for event in document["traceEvents"] if event["ph"] == "X"]
        return Trace(tuple(spans), int(other["num_unfinished"]))
    except KeyError as error:
        raise BadTrace(f"{path}: a field {error.args[0]!r} is missing; record the trace again") from error
    except (TypeError, ValueError) as error:
        raise BadTrace(f"{path}: {error}; record the trace again") from error


def _rank_events(trace: Trace, rank: int, base: int) -> Iterator[dict[str, Any]]:
    communications = trace.row("communication")
    communication_lanes = lanes(communications)
    yield _name("process_name", f"rank {rank}", rank, 0)
    for thread, name in sorted(set(_THREADS.values())):
        yield _name("thread_name", name, rank, thread)
    first = _THREADS["communication"][0]
    for lane in range(1, max(communication_lanes, default=0) + 1):
        yield _name("thread_name", f"communication {lane + 1}", rank, first + lane)
    for row in ROWS:
        spans = communications if row == "communication" else trace.row(row)
        threads = [first + lane for lane in communication_lanes] if row == "communication" else [_THREADS[row][0]] * len(spans)
        for span, thread in zip(spans, threads, strict=True):
            yield _event(span, thread, base)


def _name(kind: str, name: str, rank: int, thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": {"name": name}}


def _event(span: Span, thread: int, base: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.row,
        "pid": span.rank,
        "tid": thread,
        "ts": (span.start_ns - base) / 1000,
        "dur": span.duration_ns / 1000,
        "args": {"layer": span.layer, "micro_batch": span.micro_batch, "rank": span.rank, "step": span.step},
    }


def _span(event: dict[str, Any], base: int) -> Span:
    row, args = event["cat"], event["args"]
    if row not in ROWS:
        raise ValueError(f"event {event['name']!r} is of row {row!r}, expected one of {', '.join(ROWS)}")
    start = base + round(event["ts"] * 1000)
    return Span(
        row=row,
        name=str(event["name"]),
        rank=int(args["rank"]),
        start_ns=start,
        end_ns=start + round(event["dur"] * 1000),
        layer=_number(args["layer"]),
        micro_batch=_number(args["micro_batch"]),
        step=_number(args["step"]),
    )


def _number(value: Any) -> int | None:
    return None if value is None else int(value)
