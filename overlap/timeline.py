"""The timeline of one rank: records when operations, waits and communications begin and end.

Whoever runs operations holds a Timeline or None; with None nothing is recorded and nothing is paid but that check. Times are
`time.perf_counter_ns`, which the processes of one machine share. On a device a `DeviceClock` gives the times of computation and
communication; without one they are the CPU's own.

The executor tells it of operations. What it can't see must be marked: a communication from submit to completion
(`communication`), and where an operation waits for one (`wait`) - an unmarked wait would count as computation.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from moesaic.overlap.intervals import Interval, subtract, union
from moesaic.overlap.operations import Operation
from moesaic.overlap.trace import Row, Span, Trace

_now = time.perf_counter_ns


class DeviceClock(Protocol):
    """Times on a device, by marks in its streams (CUDA events)."""

    def mark(self) -> Any:
        """Put a mark into the current stream; must not wait."""
        ...

    def time_ns(self, mark: Any) -> int:
        """When the stream reached the mark, on the clock of `time.perf_counter_ns`; waits until it has."""
        ...


@dataclass(slots=True, kw_only=True)
class _Record:
    row: Row
    name: str
    layer: int | None
    micro_batch: int | None
    step: int | None
    operation: _Record | None
    """Of a wait: the operation it is part of."""
    start_ns: int = 0
    end_ns: int | None = None
    start_mark: Any = None
    end_mark: Any = None


class Communication:
    """A communication under way."""

    __slots__ = ("_clock", "_record")

    def __init__(self, record: _Record, clock: DeviceClock | None) -> None:
        self._record = record
        self._clock = clock

    def end(self, *_: object) -> None:
        """It has completed; callable from any thread. Arguments are ignored, so it can be given to a future as its callback. With
        a device clock: call it with the communication's stream current. Only the first call counts.
        """
        record = self._record
        if record.end_ns is None:
            if self._clock is not None:
                record.end_mark = self._clock.mark()
            record.end_ns = _now()


class _Recording:
    """A span that ends with a `with` block."""

    __slots__ = ("_record", "_timeline")

    def __init__(self, timeline: Timeline, record: _Record) -> None:
        self._timeline = timeline
        self._record = record

    def __enter__(self) -> None:
        self._timeline._begin(self._record)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._timeline._end(self._record)


class Timeline:
    """Records until it is thrown away; all but `Communication.end` is for the thread that runs the operations."""

    def __init__(self, *, rank: int, device_clock: DeviceClock | None = None) -> None:
        self._rank = rank
        self._clock = device_clock
        self._records: list[_Record] = []
        self._step: int | None = None
        self._operation: _Record | None = None

    def enter(self, operation: Operation, micro_batch: int) -> None:
        """The CPU begins an operation."""
        record = self._new("cpu", operation.name, operation.layer, micro_batch)
        self._operation = record
        self._begin(record)

    def leave(self) -> None:
        """The CPU comes back from the operation entered last."""
        assert self._operation is not None, "leave without enter"
        self._end(self._operation)
        self._operation = None

    def communication(self, name: str, micro_batch: int | None = None) -> Communication:
        """A communication begins; call `end` when it has completed. micro_batch: by default that of the operation which submits it.

        With a device clock: call it with the communication's stream current.
        """
        record = self._new("communication", name, None, micro_batch)
        self._begin(record)
        return Communication(record, self._clock)

    def wait(self, name: str) -> _Recording:
        """`with timeline.wait("dispatch"): ...` around a wait for a communication. Not nested."""
        return _Recording(self, self._new("wait", name, None, None))

    def step(self, number: int) -> _Recording:
        """`with timeline.step(7): ...` around a whole step; what is recorded meanwhile belongs to it."""
        self._step = number
        return _Recording(self, self._new("step", f"step {number}", None, None))

    def trace(self) -> Trace:
        """What has been recorded. Waits for the device to reach the last mark; unfinished spans are left out."""
        records = list(self._records)
        waits: dict[int, list[Interval]] = defaultdict(list)
        for record in records:
            if record.row == "wait" and record.operation is not None and record.end_ns is not None:
                waits[id(record.operation)].append(self._computed(record))
        spans = [span for record in records if record.end_ns is not None for span in self._spans(record, waits[id(record)])]
        unfinished = sum(record.row == "communication" and record.end_ns is None for record in records)
        return Trace(tuple(spans), unfinished)

    def _new(self, row: Row, name: str, layer: int | None, micro_batch: int | None) -> _Record:
        operation = self._operation
        if operation is not None:
            layer = operation.layer
            if micro_batch is None:
                micro_batch = operation.micro_batch
        return _Record(row=row, name=name, layer=layer, micro_batch=micro_batch, step=self._step, operation=operation)

    def _begin(self, record: _Record) -> None:
        self._records.append(record)
        record.start_ns = _now()
        if self._clock is not None:
            record.start_mark = self._clock.mark()

    def _end(self, record: _Record) -> None:
        if self._clock is not None:
            record.end_mark = self._clock.mark()
        record.end_ns = _now()
        if record.row == "step":
            self._step = None

    def _spans(self, record: _Record, waits: list[Interval]) -> list[Span]:
        host = (record.start_ns, record.end_ns or record.start_ns)
        if record.row == "cpu":
            computed = subtract(union([self._computed(record)]), union(waits))
            return [self._span(record, "cpu", host), *(self._span(record, "computation", each) for each in computed)]
        if record.row == "communication":
            return [self._span(record, "communication", self._computed(record))]
        return [self._span(record, record.row, host)]

    def _span(self, record: _Record, row: Row, interval: Interval) -> Span:
        return Span(
            row=row,
            name=record.name,
            rank=self._rank,
            start_ns=interval[0],
            end_ns=interval[1],
            layer=record.layer,
            micro_batch=record.micro_batch,
            step=record.step,
        )

    def _computed(self, record: _Record) -> Interval:
        """When it ran where it computes: the device's times if there are any, else the CPU's."""
        if self._clock is not None:
            return self._clock.time_ns(record.start_mark), self._clock.time_ns(record.end_mark)
        assert record.end_ns is not None, "only finished records have times"
        return record.start_ns, record.end_ns
