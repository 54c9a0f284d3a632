"""Runs an operation list as it is, without a strategy."""

from __future__ import annotations

from moesaic.overlap.executor import Schedule
from moesaic.overlap.operations import OperationList, Recorder, State
from moesaic.overlap.stages import cut_into_stages


def run_straight(operations: OperationList, state: State, recorder: Recorder | None = None) -> None:
    Schedule.straight(cut_into_stages(operations)).run([state], recorder)
