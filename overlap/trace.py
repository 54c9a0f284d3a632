"""A recorded timeline as a value: spans of time on rows, per rank, step and micro-batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from moesaic.overlap.intervals import Interval
from moesaic.overlap.operations import titled

Row = Literal["step", "cpu", "wait", "computation", "communication"]
"""step: the whole of it. cpu: from an operation's submit until the call came back. wait: the part of that in which the CPU (or the
device's computation stream) waited for a communication. computation: the operation's start to end where it computes, waits taken
out. communication: from submit to completion, that is with the time other ranks come late."""

ROWS: tuple[Row, ...] = get_args(Row)


class BadTrace(ValueError):  # noqa: N818 - reads as what is wrong
    """Not a trace, or one without what was asked of it."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """name: of the operation, communication or wait. Times: of one clock. layer, micro_batch, step: None where there is none."""

    row: Row
    name: str
    rank: int
    start_ns: int
    end_ns: int
    layer: int | None = None
    micro_batch: int | None = None
    step: int | None = None

    @property
    def title(self) -> str:
        return titled(self.name, self.layer)

    @property
    def interval(self) -> Interval:
        return self.start_ns, self.end_ns

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True)
class Trace:
    """Spans of any number of ranks, in any order. num_unfinished: communications that had not ended and so are not in it."""

    spans: tuple[Span, ...]
    num_unfinished: int = 0

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({span.rank for span in self.spans}))

    @cached_property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({span.step for span in self.spans if span.step is not None}))

    def row(self, row: Row) -> list[Span]:
        """Spans of one row, by start."""
        return sorted((span for span in self.spans if span.row == row), key=lambda span: span.interval)

    def only(self, *, rank: int | None = None, step: int | None = None) -> Trace:
        """The part of one rank, of one step, or both. Raises BadTrace when there is none."""
        if rank is not None and rank not in self.ranks:
            raise BadTrace(f"the trace has no rank {rank}; its ranks are {_listed(self.ranks)}")
        if step is not None and step not in self.steps:
            raise BadTrace(f"the trace has no step {step}; its steps are {_listed(self.steps)}")
        kept = (span for span in self.spans if rank in (None, span.rank) and step in (None, span.step))
        return Trace(tuple(kept), self.num_unfinished)


def merge(traces: Iterable[Trace]) -> Trace:
    """Traces of several ranks as one. Their clocks must be one: the ranks of one machine share it, machines don't."""
    every = list(traces)
    return Trace(tuple(span for trace in every for span in trace.spans), sum(trace.num_unfinished for trace in every))


def _listed(numbers: tuple[int, ...]) -> str:
    """0, 1, 2, or 0..99 when there are many."""
    if not numbers:
        return "none"
    return ", ".join(map(str, numbers)) if len(numbers) <= 8 else f"{numbers[0]}..{numbers[-1]} ({len(numbers)})"
