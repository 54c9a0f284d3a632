"""Two micro-batches run in lockstep exactly as specified, with the results of straight runs; failures name who and where."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operation_lists import run_straight

from moesaic.overlap.executor import Schedule
from moesaic.overlap.operations import Operation, OperationError, State, YieldOperation
from moesaic.overlap.stages import cut_into_stages

Lists = list[Operation | YieldOperation]
SHAPES = st.lists(st.integers(0, 3), min_size=1, max_size=6)
"""Operations in each stage."""


def logging_list(shape: list[int]) -> Lists:
    """Operations that note (micro-batch, stage, place)."""

    def log(stage: int, place: int) -> Operation:
        return Operation(f"{stage}.{place}", lambda state: state.peek("log").append((state.peek("who"), stage, place)))

    operations: Lists = []
    for stage, count in enumerate(shape):
        operations += [YieldOperation()] if stage else []
        operations += [log(stage, place) for place in range(count)]
    return operations


def run_logged(first: list[int], second: list[int], delta: int) -> list[tuple[str, int, int]]:
    log: list[tuple[str, int, int]] = []
    stages = [cut_into_stages(logging_list(shape)) for shape in (first, second)]
    Schedule.lockstep(*stages, delta_stages=delta).run((State(log=log, who="A"), State(log=log, who="B")))
    return log


@pytest.mark.parametrize(
    ("delta", "order"),
    [
        (0, "A0 B0 A1 B1 A2 B2 A3 B3"),
        (1, "A0 A1 B0 A2 B1 A3 B2 B3"),
        (2, "A0 A1 A2 B0 A3 B1 B2 B3"),
        (4, "A0 A1 A2 A3 B0 B1 B2 B3"),
    ],
)
def test_the_order_of_four_stages_each(delta: int, order: str) -> None:
    log = run_logged([1] * 4, [1] * 4, delta)
    assert " ".join(f"{who}{stage}" for who, stage, _ in log) == order


@given(SHAPES, SHAPES, st.integers(0, 7))
def test_lockstep_for_any_lists_and_offset(first: list[int], second: list[int], delta: int) -> None:
    """A machine that follows the specification's words: alone, in turns, and whoever is left finishes alone."""
    expected: list[tuple[str, int]] = []
    waiting = {"A": list(range(len(first))), "B": list(range(len(second)))}
    for _ in range(delta):
        expected += [("A", waiting["A"].pop(0))] if waiting["A"] else []
    while waiting["A"] or waiting["B"]:
        for who, stages in waiting.items():
            expected += [(who, stages.pop(0))] if stages else []
    counts = {"A": first, "B": second}
    operations = [(who, stage, place) for who, stage in expected for place in range(counts[who][stage])]
    assert run_logged(first, second, delta) == operations


@given(SHAPES, SHAPES, st.integers(0, 7))
def test_every_operation_runs_once_in_its_lists_order_and_nothing_comes_between_a_stage(
    first: list[int], second: list[int], delta: int
) -> None:
    log = run_logged(first, second, delta)
    for who, shape in (("A", first), ("B", second)):
        own = [(stage, place) for name, stage, place in log if name == who]
        assert own == [(stage, place) for stage, count in enumerate(shape) for place in range(count)]
    for (who, stage, place), after in pairwise(log):
        last = place == {"A": first, "B": second}[who][stage] - 1
        assert last or after == (who, stage, place + 1)


@given(st.lists(st.sampled_from(["+3", "*2", "yield", "-1"]), max_size=15), st.integers(0, 4), st.integers(), st.integers())
def test_split_and_straight_give_the_same_results(recipe: list[str], delta: int, one: int, two: int) -> None:
    def operation(step: str) -> Operation | YieldOperation:
        if step == "yield":
            return YieldOperation()
        change = {"+3": lambda x: x + 3, "*2": lambda x: x * 2, "-1": lambda x: x - 1}[step]
        return Operation(step, lambda state: state.put("x", change(state.take("x"))))

    operations = [operation(step) for step in recipe]
    straight = [State(x=one), State(x=two)]
    for state in straight:
        run_straight(operations, state)
    split, stages = [State(x=one), State(x=two)], cut_into_stages(operations)
    Schedule.lockstep(stages, stages, delta_stages=delta).run(split)
    assert [state.take("x") for state in split] == [state.take("x") for state in straight]
    for state in split:
        state.finish()


def test_a_straight_schedule_runs_the_unsplit_batch() -> None:
    log: list[tuple[str, int, int]] = []
    Schedule.straight(cut_into_stages(logging_list([1, 2]))).run([State(log=log, who="A")])
    assert log == [("A", 0, 0), ("A", 1, 0), ("A", 1, 1)]


def test_a_failure_names_operation_layer_and_micro_batch_and_stops_both() -> None:
    cause = ZeroDivisionError("nothing to divide")
    ran: list[str] = []

    def gate(state: State) -> None:
        if state.peek("who") == "B":
            raise cause
        ran.append("gate")

    stages = cut_into_stages(
        [Operation("gate", gate, 3), YieldOperation(), Operation("experts", lambda _: ran.append("experts"), 3)]
    )
    with pytest.raises(OperationError, match=r"^operation gate of layer 3 failed in micro-batch 1: nothing to divide$") as caught:
        Schedule.lockstep(stages, stages, delta_stages=0).run((State(who="A"), State(who="B")))
    assert caught.value.__cause__ is cause
    assert (caught.value.operation.name, caught.value.operation.layer, caught.value.micro_batch) == ("gate", 3, 1)
    assert ran == ["gate"]


def test_an_unsplit_batch_s_failure_names_no_micro_batch() -> None:
    stages = cut_into_stages([Operation("gate", lambda state: state.take("absent"), 3)])
    with pytest.raises(OperationError, match=r"^operation gate of layer 3 failed: ") as caught:
        Schedule.straight(stages).run([State()])
    assert caught.value.micro_batch is None


def test_a_schedule_runs_again_after_a_failure() -> None:
    stages = cut_into_stages([Operation("double", lambda state: state.put("x", state.take("x") * 2))])
    schedule = Schedule.lockstep(stages, stages, delta_stages=0)
    with pytest.raises(OperationError):
        schedule.run((State(x=1), State()))
    states = (State(x=1), State(x=2))
    schedule.run(states)
    assert [state.take("x") for state in states] == [2, 4]


def test_what_a_micro_batch_leaves_behind_is_refused() -> None:
    stages = cut_into_stages([Operation("dispatch_a", lambda state: state.put("handle", state.take("topk")))])
    states = (State(topk=1), State(topk=2))
    Schedule.lockstep(stages, stages, delta_stages=0).run(states)
    states[0].take("handle")
    states[0].finish()
    with pytest.raises(RuntimeError, match=r"values nobody took: \['handle'\]"):
        states[1].finish()


def test_micro_batches_do_not_see_each_others_values() -> None:
    stages = cut_into_stages([Operation("put", lambda state: state.put("handle", object())), YieldOperation()])
    states = (State(), State())
    Schedule.lockstep(stages, stages, delta_stages=0).run(states)
    assert states[0].take("handle") is not states[1].take("handle")


def test_a_state_for_each_micro_batch_is_demanded() -> None:
    stages = cut_into_stages([Operation("nothing", lambda state: None)])
    with pytest.raises(ValueError, match="a schedule of 2 micro-batches was given 1 states"):
        Schedule.lockstep(stages, stages, delta_stages=0).run([State()])


def test_a_negative_offset_is_refused() -> None:
    with pytest.raises(ValueError, match="delta_stages is -1"):
        Schedule.lockstep([], [], delta_stages=-1)
