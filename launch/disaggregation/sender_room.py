"""One room on a prefill rank: which decode ranks have opened it, what was announced to them, and who has read all.

Knows nothing of other rooms, and of its rank what `RoomOwner` says. See transfer.Sender.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moesaic.launch.disaggregation.link import Link
from moesaic.launch.disaggregation.loop_thread import LoopThread
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.protocol import (
    Abort,
    Closed,
    Deadlines,
    Done,
    Expect,
    FailureKind,
    Last,
    Open,
    Pages,
    TransferError,
    TransferState,
)
from moesaic.launch.disaggregation.rooms import RoomProgress


@dataclass(eq=False)
class DecodePeer:
    """A decode rank that has introduced itself."""

    link: Link
    instance: str


@dataclass(eq=False)
class _Reader:
    """A decode rank that has opened a room."""

    rank: DecodePeer
    checksum: bool
    done: bool = False


class RoomOwner(Protocol):
    """What a room needs of its rank. `owner`: its name in errors."""

    owner: str
    memory: PagedMemory
    deadlines: Deadlines
    thread: LoopThread

    def remove(self, room: SenderRoom) -> None:
        """The room has ended."""
        ...


class SenderRoom:
    """See transfer.Sender."""

    def __init__(self, owner: RoomOwner, room: int) -> None:
        self.room = room
        self._owner = owner
        self._progress = RoomProgress(room, owner.owner)
        self._expected: list[DecodePeer] = []
        self._readers: dict[int, _Reader] = {}
        self._num_readers = 0
        self._pages: list[Pages] = []
        self._num_pages = 0
        self._last: Last | None = None

    # The engine's thread

    @property
    def state(self) -> TransferState:
        return self._progress.state

    @property
    def failure(self) -> TransferError | None:
        return self._progress.failure

    def send(self, pages: npt.ArrayLike) -> None:
        numbers: list[int] = np.asarray(pages).tolist()
        if numbers:
            self._owner.thread.post(self._announce, numbers)

    def finish(self, metadata: bytes) -> None:
        self._owner.thread.post(self._finish, metadata)

    def abort(self, reason: str) -> None:
        if self._progress.give_up(reason):
            self._owner.thread.post(self._fail, "aborted", reason)

    # The transfer thread

    def handle(self, decode_rank: DecodePeer, message: Expect | Open | Done | Abort) -> None:
        """What a decode rank says of the room. Nothing is heard from one that is not, or no more, part of it."""
        reader = next((reader for reader in self._readers.values() if reader.rank is decode_rank and not reader.done), None)
        if isinstance(message, Open):
            self._open(decode_rank, message)
        elif isinstance(message, Expect):
            self._expect(decode_rank)
        elif isinstance(message, Done):
            if reader is not None:
                self._reader_done(reader)
        elif reader is not None or not self._readers:
            if reader is not None:
                reader.done = True  # it has ended the room itself
            self._fail(message.kind, f"{decode_rank.link.peer} has given it up: {message.reason}")

    def _expect(self, decode_rank: DecodePeer) -> None:
        """A decode rank will open the room, unless another instance has it: that one goes on."""
        others = [*self._expected, *(reader.rank for reader in self._readers.values())]
        rival = next((other for other in others if other.instance != decode_rank.instance), None)
        if rival is None:
            self._expected.append(decode_rank)
        else:
            refuse(decode_rank.link, self.room, f"{self._owner.owner}: the room is in use by {rival.link.peer}")

    def _open(self, decode_rank: DecodePeer, message: Open) -> None:
        """A decode rank has its pages ready. One that may not open the room is refused; the others go on."""
        refusal = self._refusal(decode_rank, message)
        if refusal is not None:
            refuse(decode_rank.link, self.room, f"{self._owner.owner}: {refusal}")
            return
        if decode_rank in self._expected:
            self._expected.remove(decode_rank)
        reader = _Reader(decode_rank, message.checksum)
        self._readers[message.receiver] = reader
        self._num_readers = message.num_receivers
        for pages in self._pages:
            self._tell(reader, pages)
        if self._last is not None:
            decode_rank.link.send(self._last)
        if len(self._readers) == self._num_readers:
            self._progress.advance(TransferState.TRANSFERRING if self._pages or self._last else TransferState.WAITING)

    def _reader_done(self, reader: _Reader) -> None:
        """A decode rank has read all. Its answer is what makes that count: the pages were held until now."""
        if self._last is None:
            self._fail("corrupt", f"{reader.rank.link.peer} has read the room's pages before the last was sent")
            return
        reader.done = True
        reader.rank.link.send(Closed(room=self.room))
        self._progress.touch()
        if len(self._readers) == self._num_readers and all(other.done for other in self._readers.values()):
            self._progress.advance(TransferState.SUCCESS)
            self._owner.remove(self)

    def lost(self, decode_rank: DecodePeer, reason: str) -> None:
        """The connection to a decode rank is over."""
        reads = any(reader.rank is decode_rank and not reader.done for reader in self._readers.values())
        if reads or decode_rank in self._expected:
            self._fail("lost", reason)

    def check_deadline(self) -> None:
        limit = self._progress.overdue(self._owner.deadlines)
        if limit is not None:
            waits_for = {
                TransferState.BOOTSTRAPPING: f"{len(self._readers)} decode ranks have opened it, of {self._num_readers or 'all'}",
                TransferState.WAITING: "its prompt has not been computed",
                TransferState.TRANSFERRING: "no page was computed and no decode rank has said that it has all",
            }[self._progress.stage]
            self._fail("deadline", f"stuck for {limit:g} s: {waits_for}")

    def _announce(self, numbers: list[int]) -> None:
        if self._progress.ended:
            return
        assert self._last is None, f"room {self.room}: pages sent after the last"
        pages = Pages(room=self.room, first_index=self._num_pages, numbers=numbers)
        self._num_pages += len(numbers)
        self._pages.append(pages)
        for reader in self._readers.values():
            self._tell(reader, pages)
        self._has_begun()

    def _finish(self, metadata: bytes) -> None:
        if self._progress.ended:
            return
        assert self._last is None, f"room {self.room}: finished twice"
        self._last = Last(room=self.room, num_pages=self._num_pages, metadata=metadata)
        for reader in self._readers.values():
            reader.rank.link.send(self._last)
        self._has_begun()

    def _has_begun(self) -> None:
        if self._progress.stage is TransferState.WAITING:
            self._progress.advance(TransferState.TRANSFERRING)
        elif self._progress.stage is TransferState.TRANSFERRING:
            self._progress.touch()

    def _tell(self, reader: _Reader, pages: Pages) -> None:
        """Announce pages, with their checksums if this decode rank wants them."""
        if reader.checksum:
            checksums = [self._owner.memory.checksum(number) for number in pages.numbers]
            pages = Pages(room=pages.room, first_index=pages.first_index, numbers=pages.numbers, checksums=checksums)
        reader.rank.link.send(pages)

    def _refusal(self, decode_rank: DecodePeer, message: Open) -> str | None:
        """Why this decode rank may not open the room."""
        if self._progress.ended:
            return "the room has ended"
        others = [reader.rank for reader in self._readers.values()]
        if message.receiver in self._readers or any(other.instance != decode_rank.instance for other in others):
            return f"the room is in use by {others[0].link.peer}"
        if others and message.num_receivers != self._num_readers:
            return f"it is opened for {message.num_receivers} decode ranks and was opened for {self._num_readers}"
        return None

    def _fail(self, kind: FailureKind, why: str) -> None:
        if self._progress.ended:
            return
        self._progress.fail(kind, why)
        for reader in self._readers.values():
            if not reader.done:
                refuse(reader.rank.link, self.room, str(self.failure), kind)
        for decode_rank in self._expected:
            refuse(decode_rank.link, self.room, str(self.failure), kind)
        self._owner.remove(self)


def refuse(link: Link, room: int, reason: str, kind: FailureKind = "refused") -> None:
    """Tell a decode rank that its room has failed."""
    link.send(Abort(room=room, kind=kind, reason=reason))
