"""A timeline records operations, waits, communications and steps, from the executor and from other threads."""

from __future__ import annotations

import threading

import pytest
from operation_lists import run_straight

from moesaic.overlap.executor import Schedule
from moesaic.overlap.operations import Operation, OperationError, State, YieldOperation
from moesaic.overlap.stages import cut_into_stages
from moesaic.overlap.timeline import Timeline
from moesaic.overlap.timeline_figures import Launch, submitted_before
from moesaic.overlap.trace import Row, Span, Trace


def titles(trace: Trace, row: Row) -> list[tuple[str, int | None]]:
    return [(span.title, span.micro_batch) for span in trace.row(row)]


def nothing(state: State) -> None:
    pass


def test_every_operation_of_both_micro_batches_is_recorded_in_the_order_it_ran() -> None:
    stages = cut_into_stages([Operation("gate", nothing, 3), YieldOperation(), Operation("experts", nothing, 3)])
    timeline = Timeline(rank=5)
    with timeline.step(7):
        Schedule.lockstep(stages, stages, delta_stages=0).run((State(), State()), timeline)
    trace = timeline.trace()
    order = [("gate of layer 3", 0), ("gate of layer 3", 1), ("experts of layer 3", 0), ("experts of layer 3", 1)]
    assert titles(trace, "cpu") == titles(trace, "computation") == order
    assert {(span.rank, span.step) for span in trace.spans} == {(5, 7)}
    (step,) = trace.row("step")
    assert all(step.start_ns <= span.start_ns <= span.end_ns <= step.end_ns for span in trace.spans)
    assert submitted_before(trace, Launch("gate of layer 3", 1), Launch("experts of layer 3", 0))


def test_a_straight_run_is_micro_batch_0_of_no_step() -> None:
    timeline = Timeline(rank=0)
    run_straight([Operation("gate", nothing), YieldOperation(), Operation("experts", nothing)], State(), timeline)
    trace = timeline.trace()
    assert titles(trace, "cpu") == [("gate", 0), ("experts", 0)]
    assert trace.steps == ()


def test_a_communication_ends_in_another_thread_and_the_wait_for_it_is_not_computation() -> None:
    timeline = Timeline(rank=0)
    submitted, go = threading.Event(), threading.Event()

    def submit(state: State) -> None:
        communication = timeline.communication("dispatch")

        def complete() -> None:
            go.wait()
            communication.end("a future that is done")
            submitted.set()

        threading.Thread(target=complete).start()

    def receive(state: State) -> None:
        with timeline.wait("dispatch"):
            go.set()
            submitted.wait()

    stages = cut_into_stages([Operation("dispatch_a", submit, 4), YieldOperation(), Operation("dispatch_b", receive, 4)])
    with timeline.step(0):
        Schedule.lockstep(stages, [()], delta_stages=0).run((State(), State()), timeline)
    trace = timeline.trace()
    (communication,), (wait,) = trace.row("communication"), trace.row("wait")
    assert (communication.layer, communication.micro_batch, communication.step) == (4, 0, 0)
    assert (wait.layer, wait.micro_batch, wait.step) == (4, 0, 0)
    assert wait.start_ns <= communication.end_ns <= wait.end_ns
    operation = trace.row("cpu")[1]
    computed = [span for span in trace.row("computation") if span.name == "dispatch_b"]
    assert sum(span.duration_ns for span in computed) == operation.duration_ns - wait.duration_ns
    assert all(span.end_ns <= wait.start_ns or span.start_ns >= wait.end_ns for span in computed)


def test_a_communication_that_has_not_ended_is_left_out_and_counted() -> None:
    timeline = Timeline(rank=0)
    open_one, ended = timeline.communication("combine", micro_batch=1), timeline.communication("dispatch", micro_batch=0)
    ended.end()
    trace = timeline.trace()
    assert (titles(trace, "communication"), trace.num_unfinished) == ([("dispatch", 0)], 1)
    open_one.end()
    assert titles(timeline.trace(), "communication") == [("combine", 1), ("dispatch", 0)]


def test_only_the_first_end_counts() -> None:
    timeline = Timeline(rank=0)
    communication = timeline.communication("dispatch")
    communication.end()
    before = timeline.trace()
    communication.end()
    assert timeline.trace() == before


def test_an_operation_that_fails_is_recorded_and_the_next_step_is_clean() -> None:
    def fail(state: State) -> None:
        raise RuntimeError("broken")

    timeline = Timeline(rank=0)
    with pytest.raises(OperationError), timeline.step(1):
        run_straight([Operation("experts", fail, 2)], State(), timeline)
    assert titles(timeline.trace(), "cpu") == [("experts of layer 2", 0)]
    timeline.communication("after").end()
    (after,) = timeline.trace().row("communication")
    assert (after.step, after.layer, after.micro_batch) == (None, None, None)


class CountingClock:
    """A device whose time is 1000 more with every mark."""

    def __init__(self) -> None:
        self.marks = 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def time_ns(self, mark: int) -> int:
        return mark * 1000


def test_a_device_clock_gives_the_times_of_computation_and_communication() -> None:
    timeline = Timeline(rank=0, device_clock=CountingClock())

    def receive(state: State) -> None:
        communication = timeline.communication("combine")
        with timeline.wait("combine"):
            communication.end()

    run_straight([Operation("combine_b", receive)], State(), timeline)
    trace = timeline.trace()
    intervals = {row: [span.interval for span in trace.row(row)] for row in ("computation", "communication")}
    assert intervals == {"communication": [(2000, 4000)], "computation": [(1000, 3000), (5000, 6000)]}
    host: Span = trace.row("cpu")[0]
    assert host.start_ns > 1_000_000
