"""What a trace says, as figures: pure functions of a `Trace`. Narrow it first (`trace.only`) to speak of one rank or step.

Of several ranks each is measured by itself and the times are summed, so a share is the mean weighted by time.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.overlap.intervals import Interval, intersect, subtract, total, union
from moesaic.overlap.trace import BadTrace, Row, Span, Trace


def covered(trace: Trace, row: Row, rank: int) -> list[Interval]:
    """When a row of a rank was busy."""
    return union(span.interval for span in trace.spans if span.row == row and span.rank == rank)


def hidden_share(trace: Trace) -> float | None:
    """Share of the time with a communication under way in which the same rank computed, in [0, 1]; None without communication."""
    hidden = communicating = 0
    for rank in trace.ranks:
        communication = covered(trace, "communication", rank)
        hidden += total(intersect(communication, covered(trace, "computation", rank)))
        communicating += total(communication)
    return hidden / communicating if communicating else None


def exposed(trace: Trace, rank: int) -> list[Interval]:
    """When a communication was under way and the rank did not compute."""
    return subtract(covered(trace, "communication", rank), covered(trace, "computation", rank))


def idle_share(trace: Trace) -> float | None:
    """Share of the steps' time in which the computation row was empty, in [0, 1]. Without marked steps: from the first to the last
    span. None without time.
    """
    idle = whole = 0
    for rank in trace.ranks:
        steps = step_intervals(trace, rank)
        idle += total(subtract(steps, covered(trace, "computation", rank)))
        whole += total(steps)
    return idle / whole if whole else None


def step_intervals(trace: Trace, rank: int) -> list[Interval]:
    """The steps of a rank as a set of intervals; without marked steps the one from its first span to its last."""
    steps = covered(trace, "step", rank)
    if steps:
        return steps
    spans = [span.interval for span in trace.spans if span.rank == rank]
    return [(min(start for start, _ in spans), max(end for _, end in spans))] if spans else []


def step_times_ns(trace: Trace) -> dict[int, int]:
    """Step -> from the first rank's start to the last rank's end."""
    steps: dict[int, tuple[int, int]] = {}
    for span in trace.row("step"):
        if span.step is not None:
            start, end = steps.get(span.step, span.interval)
            steps[span.step] = (min(start, span.start_ns), max(end, span.end_ns))
    return {number: end - start for number, (start, end) in sorted(steps.items())}


def longest_waits(trace: Trace, count: int) -> list[Span]:
    """The `count` longest, longest first."""
    return sorted(trace.row("wait"), key=lambda span: -span.duration_ns)[:count]


@dataclass(frozen=True)
class Launch:
    """An operation by its title (`gate of layer 3`), of one micro-batch."""

    title: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.title!r} of micro-batch {self.micro_batch}"


def submitted_before(trace: Trace, earlier: Launch, later: Launch) -> bool:
    """Whether `earlier` was submitted before `later` on every rank in every step that has both.

    When either ran several times in a step: every time of `earlier` before the first of `later`. Raises BadTrace when no step has
    both, naming what is missing.
    """
    first, second = _submits(trace, earlier), _submits(trace, later)
    common = first.keys() & second.keys()
    if not common:
        missing = next((each for each, found in ((earlier, first), (later, second)) if not found), None)
        cause = f"the trace has no {missing}" if missing else f"no step has both {earlier} and {later}"
        raise BadTrace(f"{cause}; its operations are called like 'gate of layer 3'")
    return all(max(first[key]) < min(second[key]) for key in common)


def _submits(trace: Trace, launch: Launch) -> dict[tuple[int, int | None], list[int]]:
    """(rank, step) -> when it was submitted."""
    found: dict[tuple[int, int | None], list[int]] = {}
    for span in trace.spans:
        if span.row == "cpu" and span.micro_batch == launch.micro_batch and span.title == launch.title:
            found.setdefault((span.rank, span.step), []).append(span.start_ns)
    return found
