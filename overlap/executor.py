"""Schedules: in which order the stages of one or two micro-batches run, and the run itself.

A schedule is made once per model and strategy and run every step. It knows no threads: two micro-batches advance in turns on the
thread that calls `run`; what overlaps are the communications that one has submitted with the computation that the other submits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.overlap.operations import Failures, Recorder, State, run_stage
from moesaic.overlap.stages import Stage


@dataclass(frozen=True)
class Turn:
    """One stage of one micro-batch (0 or 1)."""

    micro_batch: int
    stage: Stage


@dataclass(frozen=True)
class Schedule:
    """Turns in the order they run. Every operation of every list is in it once, in its list's order."""

    turns: tuple[Turn, ...]
    num_micro_batches: int

    @classmethod
    def straight(cls, stages: Sequence[Stage]) -> Schedule:
        """One micro-batch, stage after stage: the batch unsplit."""
        return cls(tuple(Turn(0, stage) for stage in stages), 1)

    @classmethod
    def lockstep(cls, first: Sequence[Stage], second: Sequence[Stage], *, delta_stages: int) -> Schedule:
        """The first micro-batch runs `delta_stages` stages alone, then they alternate (first, second, first, ...); who has stages
        left when the other is done finishes alone. delta_stages 0: A1 B1 A2 B2 ... Raises ValueError below 0.
        """
        if delta_stages < 0:
            raise ValueError(f"delta_stages is {delta_stages}; the first micro-batch runs 0 or more stages ahead")
        turns: list[Turn] = []
        for place in range(max(len(first), len(second) + delta_stages)):
            if place < len(first):
                turns.append(Turn(0, first[place]))
            if 0 <= place - delta_stages < len(second):
                turns.append(Turn(1, second[place - delta_stages]))
        return cls(tuple(turns), 2)

    def run(self, states: Sequence[State], recorder: Recorder | None = None, failures: Failures | None = None) -> None:
        """Run every operation on its micro-batch's state; at most one step at a time.

        Results stay in the states: the caller takes them and calls `State.finish`. With `failures`, an operation that raises and
        has a `blank` is left out: the caller must look there before it uses any result. Every other failure raises OperationError
        (it names operation, layer and micro-batch), and no further operation of either micro-batch runs. Raises ValueError when
        there isn't a state for each.
        """
        if len(states) != self.num_micro_batches:
            raise ValueError(f"a schedule of {self.num_micro_batches} micro-batches was given {len(states)} states")
        split = self.num_micro_batches > 1
        for turn in self.turns:
            micro_batch = turn.micro_batch
            run_stage(turn.stage, states[micro_batch], micro_batch if split else None, recorder, failures)
