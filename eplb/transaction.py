"""What the ranks say to each other once per step, what follows from it, and the two-phase commit of one layer that rests on it.

Every rank adds one int64 *word* to the step header. All ranks see the same words in the same step and judge them by the same pure
function, so they always agree: a phase ends when every word says READY, and is abandoned when any says FAILED. Knows no process
group and no clock of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from moesaic.eplb.mover import Mover
from moesaic.eplb.moves import LayerMoves

CYCLE_BITS, LAYER_BITS, PAYLOAD_BITS = 14, 10, 28
_PHASE_BITS = _CAUSE_BITS = 4
_STATE_BITS = 2


class Phase(IntEnum):
    """Where a cycle is. MOVE is one layer's; DRAIN follows when a cycle is abandoned."""

    IDLE = 0
    GATHER = 1
    PLAN = 2
    MOVE = 3
    DRAIN = 4


class State(IntEnum):
    """How a rank stands in the phase."""

    WORKING = 0
    READY = 1
    FAILED = 2


class Cause(IntEnum):
    """Why a cycle was abandoned; `text` says it in words."""

    NONE = 0
    GATHER_FAILED = 1
    PLAN_FAILED = 2
    PLAN_STALLED = 3
    PLAN_DIFFERS = 4
    TRANSFER_FAILED = 5
    CHECKSUM = 6
    OWN_DEADLINE = 7
    RANK_STALLED = 8
    OUT_OF_STEP = 9
    BLOCKED = 10

    @property
    def text(self) -> str:
        return _CAUSE_TEXT[self]


_CAUSE_TEXT = {
    Cause.NONE: "nothing",
    Cause.GATHER_FAILED: "its expert counts could not be summed",
    Cause.PLAN_FAILED: "its planner failed",
    Cause.PLAN_STALLED: "its planner passed the deadline and was replaced",
    Cause.PLAN_DIFFERS: "its plan is not that of rank 0",
    Cause.TRANSFER_FAILED: "a message of its weights failed",
    Cause.CHECKSUM: "weights did not arrive as they were sent",
    Cause.OWN_DEADLINE: "it did not finish the phase within the deadline",
    Cause.RANK_STALLED: "it made no progress within the deadline",
    Cause.OUT_OF_STEP: "its word is of another phase, cycle or layer",
    Cause.BLOCKED: "too many messages of abandoned cycles are still under way",
}


@dataclass(frozen=True, kw_only=True)
class Word:
    """One rank's word. payload: WORKING, the rank waited for + 1 (0: none); in PLAN, once READY, the
    plan's hash and decision; with RANK_STALLED the rank that is meant."""

    phase: Phase
    cycle: int
    layer: int = 0
    state: State
    cause: Cause = Cause.NONE
    payload: int = 0

    def pack(self) -> int:
        """As an int of at most 62 bits."""
        value = int(self.phase)
        for field, bits in (
            (self.state, _STATE_BITS),
            (self.cause, _CAUSE_BITS),
            (self.cycle, CYCLE_BITS),
            (self.layer, LAYER_BITS),
            (self.payload, PAYLOAD_BITS),
        ):
            assert 0 <= field < 1 << bits, f"{field} of {self} does not fit {bits} bits"
            value = value << bits | int(field)
        return value

    @staticmethod
    def unpack(value: int) -> Word | None:
        """None when it is no word."""
        fields = []
        for bits in (PAYLOAD_BITS, LAYER_BITS, CYCLE_BITS, _CAUSE_BITS, _STATE_BITS, _PHASE_BITS):
            fields.append(value & (1 << bits) - 1)
            value >>= bits
        payload, layer, cycle, cause, state, phase = fields
        try:
            return Word(phase=Phase(phase), cycle=cycle, layer=layer, state=State(state), cause=Cause(cause), payload=payload)
        except ValueError:
            return None

    @property
    def place(self) -> tuple[Phase, int, int]:
        """What must be equal on all ranks in any one step."""
        return self.phase, self.cycle, self.layer


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """READY: all ranks end the phase now. FAILED: all abandon the cycle, because of `rank`. WORKING: `rank` holds the others up."""

    state: State
    rank: int = 0
    cause: Cause = Cause.NONE

    @property
    def text(self) -> str:
        return f"rank {self.rank}: {self.cause.text}"


def judge(words: Sequence[Word | None], place: tuple[Phase, int, int]) -> Verdict:
    """All ranks' words in rank order -> what all do now; `place` is the caller's own."""
    for rank, word in enumerate(words):
        if word is None or word.place != place:
            return Verdict(state=State.FAILED, rank=rank, cause=Cause.OUT_OF_STEP)
    said = [word for word in words if word is not None]
    failed = [(word.cause == Cause.RANK_STALLED, rank) for rank, word in enumerate(said) if word.state == State.FAILED]
    if failed:
        by_hearsay, rank = min(failed)  # what a rank says of itself counts before what others say of it
        return Verdict(state=State.FAILED, rank=said[rank].payload if by_hearsay else rank, cause=said[rank].cause)
    waiting_for = {rank: word.payload - 1 for rank, word in enumerate(said) if word.state != State.READY}
    return Verdict(state=State.WORKING, rank=_held_up_by(waiting_for)) if waiting_for else Verdict(state=State.READY)


def _held_up_by(waiting_for: dict[int, int]) -> int:
    """Rank -> the rank that it waits for (-1: none). The one that waits for none, or only in a circle, at the end of a chain."""
    rank = next(iter(waiting_for))
    seen = {rank}
    while (following := waiting_for[rank]) in waiting_for and following not in seen:
        rank = following
        seen.add(rank)
    return rank


class LayerTransaction:
    """One layer's move on one rank: staged, then on all ranks in the same step either committed or abandoned."""

    def __init__(self, *, mover: Mover, cycle: int, layer: int, moves: LayerMoves, switch: Callable[[int], None]) -> None:
        """`switch(layer)` makes the layer's new map the one that forwards use."""
        self._mover = mover
        self._switch = switch
        self._begin: Callable[[], None] | None = lambda: mover.begin(cycle, layer, moves)
        self._layer = layer

    def work(self, until: float) -> bool:
        """True when this rank has staged and verified what it receives, and sent what it sends. Raises TransferError."""
        self._begin_once()
        return self._mover.work(until)

    def commit(self) -> None:
        """Roll forward: weights, then map. To be called when all ranks' words said READY, and then it must succeed.

        So a failed copy is repeated once (staging still holds everything); an error after that leaves this rank's layer unusable
        and must end the rank, as the others have switched.
        """
        try:
            self._mover.commit()
        except RuntimeError:
            self._mover.commit()
        self._switch(self._layer)

    @property
    def waiting_for(self) -> int | None:
        """The rank whose messages this one waits for."""
        return None if self._begin is not None else self._mover.waiting_for

    def drain(self, until: float) -> bool:
        """Let the abandoned layer's messages end; True when none is left."""
        self._begin_once()
        return self._mover.drain(until)

    def abandon(self) -> None:
        """Give up what is still under way."""
        if self._begin is None:
            self._mover.abandon()

    def _begin_once(self) -> None:
        if self._begin is not None:
            self._begin()
            self._begin = None
