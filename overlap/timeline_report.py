"""The report on a trace: what `moesaic timeline` prints and draws beside the picture."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from moesaic.overlap.intervals import total
from moesaic.overlap.timeline_figures import (
    covered,
    hidden_share,
    idle_share,
    longest_waits,
    step_intervals,
    step_times_ns,
)
from moesaic.overlap.trace import BadTrace, Row, Span, Trace

_NUM_WAITS = 8


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Times summed over the trace. step_us: median. hidden_share: None without communication."""

    rank: int
    step_us: float
    computation_us: float
    communication_us: float
    wait_us: float
    hidden_share: float | None
    idle_share: float


@dataclass(frozen=True, kw_only=True)
class KindReport:
    """All operations, or all communications, of one name. hidden_share: of a communication; None of an operation."""

    row: Row
    name: str
    count: int
    total_us: float
    mean_us: float
    hidden_share: float | None


@dataclass(frozen=True, kw_only=True)
class TimelineReport:
    """hidden_share, idle_share: over all ranks. step_us: of every step, first rank's start to last rank's end."""

    source: str
    num_unfinished: int
    step_us: dict[int, float]
    hidden_share: float | None
    idle_share: float
    ranks: tuple[RankReport, ...]
    kinds: tuple[KindReport, ...]
    waits: tuple[Span, ...]

    @property
    def median_step_us(self) -> float | None:
        """None when no step was marked."""
        return median(self.step_us.values()) if self.step_us else None


def timeline_report(trace: Trace, *, source: str) -> TimelineReport:
    """Raises BadTrace for a trace without operations."""
    if not trace.row("cpu"):
        raise BadTrace(f"{source}: the trace holds no operation; profile while requests are running")
    return TimelineReport(
        source=source,
        num_unfinished=trace.num_unfinished,
        step_us={step: time / 1000 for step, time in step_times_ns(trace).items()},
        hidden_share=hidden_share(trace),
        idle_share=idle_share(trace) or 0.0,
        ranks=tuple(_rank_report(trace.only(rank=rank), rank) for rank in trace.ranks),
        kinds=_kinds(trace),
        waits=tuple(longest_waits(trace, _NUM_WAITS)),
    )


def report_json(report: TimelineReport) -> dict[str, Any]:
    """The report as plain values."""
    return asdict(report) | {"median_step_us": report.median_step_us, "waits": [_wait_json(span) for span in report.waits]}


def _wait_json(span: Span) -> dict[str, Any]:
    return {
        "title": span.title,
        "rank": span.rank,
        "step": span.step,
        "micro_batch": span.micro_batch,
        "us": span.duration_ns / 1000,
    }


def _rank_report(trace: Trace, rank: int) -> RankReport:
    steps = trace.row("step")
    times = [span.duration_ns for span in steps] or [total(step_intervals(trace, rank))]
    return RankReport(
        rank=rank,
        step_us=median(times) / 1000,
        computation_us=total(covered(trace, "computation", rank)) / 1000,
        communication_us=total(covered(trace, "communication", rank)) / 1000,
        wait_us=total(covered(trace, "wait", rank)) / 1000,
        hidden_share=hidden_share(trace),
        idle_share=idle_share(trace) or 0.0,
    )


def _kinds(trace: Trace) -> tuple[KindReport, ...]:
    """Communications, then operations, those that took longest first."""
    kinds = [_kind(trace, "communication", name, spans) for name, spans in _by_name(trace, "communication").items()]
    operations = _by_name(trace, "cpu")
    kinds += [
        _kind(trace, "computation", name, spans, len(operations[name])) for name, spans in _by_name(trace, "computation").items()
    ]
    return tuple(sorted(kinds, key=lambda kind: (kind.row != "communication", -kind.total_us)))


def _by_name(trace: Trace, row: Row) -> dict[str, list[Span]]:
    groups: dict[str, list[Span]] = defaultdict(list)
    for span in trace.row(row):
        groups[span.name].append(span)
    return groups


def _kind(trace: Trace, row: Row, name: str, spans: list[Span], count: int | None = None) -> KindReport:
    """count: of operations; a wait cuts an operation's computation in several spans."""
    whole, count = sum(span.duration_ns for span in spans), len(spans) if count is None else count
    share = hidden_share(Trace((*spans, *trace.row("computation")))) if row == "communication" else None
    return KindReport(row=row, name=name, count=count, total_us=whole / 1000, mean_us=whole / count / 1000, hidden_share=share)
