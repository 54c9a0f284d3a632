"""The state of a room, the same for both ends, and the book of rooms that may not be used again.

Knows no messages and no pages. A room is advanced by the transfer thread alone and read by the engine's; the engine's only word is
`give_up`, which counts at once.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from moesaic.launch.disaggregation.protocol import (
    Deadlines,
    FailureKind,
    RoomError,
    TransferError,
    TransferState,
    check_room,
)

REMEMBERED_ROOMS = 100_000
"""Ended rooms that are still refused. Routers draw rooms at random from 2^63: this is for the copy of a request, not for chance."""


class RoomProgress:
    """`owner` names instance and rank in failures."""

    def __init__(self, room: int, owner: str) -> None:
        self.room = room
        self._owner = owner
        self._state = TransferState.BOOTSTRAPPING
        self._failure: TransferError | None = None
        self._given_up = False
        self._since = time.monotonic()

    # Any thread

    @property
    def state(self) -> TransferState:
        return TransferState.FAILED if self._given_up else self._state

    @property
    def failure(self) -> TransferError | None:
        return self._failure

    def give_up(self, reason: str) -> bool:
        """The engine wants the room no more. False if it had ended."""
        if self.state.final:
            return False
        self._failure = self._error("aborted", reason)
        self._given_up = True
        return True

    # The transfer thread

    @property
    def stage(self) -> TransferState:
        """The state as the transfer thread has it: what the engine has given up is still where it was."""
        return self._state

    @property
    def ended(self) -> bool:
        """Whether the transfer thread has closed the books on this room."""
        return self._state.final

    def advance(self, state: TransferState) -> None:
        """To a later state; the deadline begins anew."""
        assert state > self._state and not self._state.final, f"room {self.room} can't go from {self._state} to {state}"
        self._state = state
        self.touch()

    def touch(self) -> None:
        """There was progress: the deadline begins anew."""
        self._since = time.monotonic()

    def fail(self, kind: FailureKind, why: str) -> None:
        """End the room. The first reason stays."""
        assert not self._state.final
        if not self._given_up:
            self._failure = self._error(kind, why)
        self._state = TransferState.FAILED

    def overdue(self, deadlines: Deadlines) -> float | None:
        """The seconds that the room was allowed to stay in its state, once they are over."""
        if self._state.final:
            return None
        limit = deadlines.of(self._state)
        return limit if time.monotonic() - self._since > limit else None

    def _error(self, kind: FailureKind, why: str) -> TransferError:
        return TransferError(kind, f"{self._owner}, room {self.room}, in state {self._state.name.lower()}: {why}")


class RoomBook:
    """Rooms in use and rooms used. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[int] = set()
        self._used: OrderedDict[int, str] = OrderedDict()

    def claim(self, room: int) -> None:
        """From now on the room is in use. Raises RoomError for one that is or was."""
        check_room(room)
        with self._lock:
            if room in self._open:
                raise RoomError(f"bootstrap_room {room} is in use by another request; every request needs a room of its own")
            if room in self._used:
                raise RoomError(f"bootstrap_room {room} was used before; every request, a retry included, needs a room of its own")
            self._open.add(room)

    def release(self, room: int, why: str) -> None:
        """The room has ended; `why` is for those who ask later."""
        with self._lock:
            self._open.discard(room)
            self._used[room] = why
            while len(self._used) > REMEMBERED_ROOMS:
                self._used.popitem(last=False)

    def end_of(self, room: int) -> str | None:
        """How a room has ended; None for one that has not, or has never been."""
        with self._lock:
            return self._used.get(room)

    def num_open(self) -> int:
        with self._lock:
            return len(self._open)
