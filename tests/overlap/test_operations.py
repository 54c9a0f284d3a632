"""Operations hand values on once, and a failure names the operation and keeps its cause."""

from __future__ import annotations

import pytest
from operation_lists import run_straight

from moesaic.overlap.operations import Operation, OperationError, State, YieldOperation


def test_a_value_is_put_once_and_taken_once() -> None:
    state = State(hidden=1)
    state.put("topk", 2)
    assert state.peek("topk") == 2
    assert state.take("topk") == 2
    assert state.take("hidden") == 1
    state.finish()


def test_a_value_nobody_took_is_not_overwritten() -> None:
    state = State(hidden=1)
    with pytest.raises(KeyError, match="already holds 'hidden'"):
        state.put("hidden", 2)
    assert state.take("hidden") == 1
    state.put("hidden", 3)
    assert state.take("hidden") == 3


def test_none_is_a_value_too() -> None:
    state = State(residual=None)
    with pytest.raises(KeyError, match="already holds 'residual'"):
        state.put("residual", 1)
    assert state.take("residual") is None


def test_taking_what_is_not_there_says_what_is() -> None:
    state = State(b=1, a=2)
    with pytest.raises(KeyError, match=r"no 'c'; it holds \['a', 'b'\]"):
        state.take("c")
    state.take("a")
    with pytest.raises(KeyError, match="no 'a'"):
        state.take("a")


def test_leftovers_are_named_at_the_end() -> None:
    with pytest.raises(RuntimeError, match=r"nobody took: \['handle', 'shared'\]"):
        State(shared=1, handle=2).finish()


def test_run_straight_runs_every_operation_in_order_and_passes_yields() -> None:
    seen: list[str] = []

    def produce(state: State) -> None:
        seen.append("produce")
        state.put("x", 20)

    def consume(state: State) -> None:
        seen.append("consume")
        state.put("y", state.take("x") + 1)

    state = State()
    run_straight([YieldOperation(), Operation("produce", produce), YieldOperation(), Operation("consume", consume)], state)
    assert seen == ["produce", "consume"]
    assert state.take("y") == 21
    state.finish()


def test_a_failure_names_the_operation_chains_the_cause_and_stops() -> None:
    cause = ZeroDivisionError("nothing to divide")
    later: list[State] = []

    def fail(state: State) -> None:
        raise cause

    with pytest.raises(OperationError, match="operation gate of layer 3 failed: nothing to divide") as caught:
        run_straight([Operation("gate of layer 3", fail), Operation("experts of layer 3", later.append)], State())
    assert caught.value.__cause__ is cause
    assert later == []


def test_a_forgotten_hand_over_fails_in_the_operation_that_wants_it() -> None:
    with pytest.raises(OperationError, match=r"operation experts failed: .*no 'received'"):
        run_straight([Operation("experts", lambda state: state.take("received"))], State(hidden=1))


def test_an_interrupt_is_not_wrapped() -> None:
    def interrupted(state: State) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_straight([Operation("core", interrupted)], State())
