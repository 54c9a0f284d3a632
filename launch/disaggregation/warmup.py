"""The rooms of warm-up requests, which are their own other side: nothing is transferred, each end succeeds by itself."""

from __future__ import annotations

import numpy.typing as npt

from moesaic.launch.disaggregation.protocol import TransferError, TransferState
from moesaic.launch.disaggregation.rooms import RoomProgress


class _WarmupEnd:
    """One side's end of a room."""

    def __init__(self, room: int, owner: str) -> None:
        self.room = room
        self._progress = RoomProgress(room, owner)
        self._progress.advance(TransferState.WAITING)

    @property
    def state(self) -> TransferState:
        return self._progress.state

    @property
    def failure(self) -> TransferError | None:
        return self._progress.failure

    def abort(self, reason: str) -> None:
        self._progress.give_up(reason)

    def _succeed(self) -> None:
        if not self.state.final:
            self._progress.advance(TransferState.SUCCESS)


class WarmupSender(_WarmupEnd):
    """A room that no decode rank opens: it succeeds with its last page."""

    def send(self, pages: npt.ArrayLike) -> None:
        """Nobody reads them."""

    def finish(self, metadata: bytes) -> None:
        self._succeed()


class WarmupReceiver(_WarmupEnd):
    """A room that no prefill instance serves: its pages are taken as they are. `metadata` is empty."""

    metadata = b""

    @property
    def quiet(self) -> bool:
        return self.state.final

    def receive(self, pages: npt.ArrayLike, first_index: int = 0) -> None:
        self._succeed()
