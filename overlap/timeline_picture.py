"""What is drawn of a trace, whatever draws it: which step, which part of it, and bars on rows.

Every rank has three rows: CPU (operations from submit to return, waits), computation, and communication, which has as many lanes as
communications run beside each other. Time is in microseconds from the step's start.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moesaic.overlap.timeline_figures import exposed, hidden_share, idle_share, step_intervals, step_times_ns
from moesaic.overlap.trace import Span, Trace
from moesaic.overlap.trace_file import lanes

MAX_RANKS = 4
DETAIL_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class Bar:
    """label: written inside; "" for none. micro_batch: its colour. wait: hatched. lane: within its row."""

    label: str
    title: str
    micro_batch: int | None
    start_us: float
    end_us: float
    wait: bool
    lane: int


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """exposed_us: where a communication is under way and nothing computes; of the communication row only."""

    rank: int
    label: str
    num_lanes: int
    bars: tuple[Bar, ...]
    exposed_us: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Picture:
    """left_out: ranks that aren't drawn. window_us: what is shown, (start, end)."""

    title: str
    rows: tuple[PictureRow, ...]
    window_us: tuple[float, float]
    left_out: int


def fitted(name: str, characters: int) -> str:
    """A label as long as there is room: the whole name, its beginning, or nothing when that would say nothing."""
    if len(name) <= characters:
        return name
    return f"{name[: characters - 1]}\N{HORIZONTAL ELLIPSIS}" if characters >= 5 else ""


def shown_step(trace: Trace) -> int | None:
    """The step of median time, the earlier one of two; None when no step was marked."""
    times = sorted(step_times_ns(trace).items(), key=lambda item: item[1])
    return times[(len(times) - 1) // 2][0] if times else None


def whole_picture(trace: Trace) -> Picture:
    """The given trace, best that of one step, with its figures in the title."""
    ranks = trace.ranks[:MAX_RANKS]
    windows = [interval for rank in ranks for interval in step_intervals(trace, rank)]
    start = min(begin for begin, _ in windows)
    rows = tuple(row for rank in ranks for row in _rank_rows(trace.only(rank=rank), rank, start))
    end = max(end for _, end in windows)
    return Picture(title=_title(trace), rows=rows, window_us=(0.0, (end - start) / 1000), left_out=len(trace.ranks) - len(ranks))


def detail_picture(trace: Trace) -> Picture | None:
    """The middle layers with communication, close; None when the whole shows as many."""
    layers = sorted({span.layer for span in trace.row("communication") if span.layer is not None})
    if len(layers) <= DETAIL_LAYERS:
        return None
    first = (len(layers) - DETAIL_LAYERS) // 2
    chosen = layers[first : first + DETAIL_LAYERS]
    whole = whole_picture(trace)
    origin = min(start for rank in trace.ranks[:MAX_RANKS] for start, _ in step_intervals(trace, rank))
    spans = [span for span in trace.spans if span.layer in chosen and span.rank in trace.ranks[:MAX_RANKS]]
    window = ((min(s.start_ns for s in spans) - origin) / 1000, (max(s.end_ns for s in spans) - origin) / 1000)
    rows = tuple(_within(row, window) for row in whole.rows)
    title = f"Layers {chosen[0]} to {chosen[-1]}, close"
    return Picture(title=title, rows=rows, window_us=window, left_out=whole.left_out)


def _within(row: PictureRow, window: tuple[float, float]) -> PictureRow:
    bars = tuple(bar for bar in row.bars if bar.end_us > window[0] and bar.start_us < window[1])
    return replace(row, bars=bars, exposed_us=tuple(each for each in row.exposed_us if each[1] > window[0] and each[0] < window[1]))


def _title(trace: Trace) -> str:
    hidden, idle = hidden_share(trace), idle_share(trace)
    name = f"Step {trace.steps[0]}" if len(trace.steps) == 1 else "All that was recorded"
    shares = "no communication" if hidden is None else f"{hidden:.0%} of communication hidden"
    return f"{name}: {shares}, computation row idle {idle or 0:.0%}"


def _rank_rows(trace: Trace, rank: int, origin: int) -> list[PictureRow]:
    spans = trace.row("communication")
    communications = [_bar(span, span.name, lane, origin) for span, lane in zip(spans, lanes(spans), strict=True)]
    open_us = tuple(((start - origin) / 1000, (end - origin) / 1000) for start, end in exposed(trace, rank))
    return [
        _row(rank, "CPU", _cpu_bars(trace, origin)),
        _row(rank, "computation", [_bar(span, span.name, 0, origin) for span in trace.row("computation")]),
        replace(_row(rank, "communication", communications), exposed_us=open_us),
    ]


def _cpu_bars(trace: Trace, origin: int) -> list[Bar]:
    """Operations, and waits over them; an operation that waits has no label, for little of it would be seen."""
    waits = trace.row("wait")
    starts = [span.start_ns for span in waits]
    bars = []
    for span in trace.row("cpu"):
        waited = bisect_left(starts, span.start_ns) < bisect_right(starts, span.end_ns)
        bars.append(_bar(span, "" if waited else span.name, 0, origin))
    return bars + [_bar(span, "", 0, origin) for span in waits]


def _row(rank: int, label: str, bars: Sequence[Bar]) -> PictureRow:
    return PictureRow(rank=rank, label=label, num_lanes=max((bar.lane for bar in bars), default=0) + 1, bars=tuple(bars))


def _bar(span: Span, label: str, lane: int, origin: int) -> Bar:
    return Bar(
        label=label,
        title=_tooltip(span),
        micro_batch=span.micro_batch,
        start_us=(span.start_ns - origin) / 1000,
        end_us=(span.end_ns - origin) / 1000,
        wait=span.row == "wait",
        lane=lane,
    )


def _tooltip(span: Span) -> str:
    what = f"waits for {span.title}" if span.row == "wait" else span.title
    where = "" if span.micro_batch is None else f", micro-batch {span.micro_batch}"
    return f"{what}{where}, rank {span.rank}: {span.duration_ns / 1000:,.1f} us"
