"""The prefill side of all rooms of one rank: it announces complete pages to the decode ranks and hears when they have been read.

Knows nothing of how pages travel (`transfer.Backend`). The pages of a room are only ever read from here, and a decode rank takes
what it has read for good only after `Closed`: a room that is given up needs no wait, its pages may be reused at once.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesaic.launch.disaggregation.link import Link, LinkError
from moesaic.launch.disaggregation.loop_thread import LoopThread
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.protocol import (
    PROTOCOL_VERSION,
    WARMUP_HOST,
    Abort,
    Closed,
    ControlMessage,
    Deadlines,
    Done,
    Expect,
    FailureKind,
    Hello,
    KVLayout,
    Last,
    LayoutMismatchError,
    Open,
    Pages,
    Refused,
    TransferError,
    TransferState,
    Welcome,
    check_same_kv,
    to_prefill_decoder,
)
from moesaic.launch.disaggregation.rooms import RoomBook, RoomProgress
from moesaic.launch.disaggregation.transfer import PROGRESS_S, Backend, Sender
from moesaic.launch.disaggregation.warmup import WarmupSender

TICK_S = 0.1
IDLE_S = 0.01
_START_S = 10.0


@dataclass(eq=False)
class _DecodeRank:
    """A decode rank that has introduced itself."""

    link: Link
    instance: str


@dataclass(eq=False)
class _Reader:
    """A decode rank that has opened a room."""

    rank: _DecodeRank
    checksum: bool
    done: bool = False


@dataclass(frozen=True)
class _Early:
    """What a decode rank has said of a room before the request was here."""

    rank: _DecodeRank
    message: Expect | Open | Abort
    since: float


class PrefillTransfer:
    """One prefill rank's end. `address` is where decode ranks find it; `instance` is unique per start of a server."""

    def __init__(
        self,
        *,
        instance: str,
        rank: int,
        layout: KVLayout,
        memory: PagedMemory,
        backend: Backend,
        host: str = "127.0.0.1",
        port: int = 0,
        deadlines: Deadlines | None = None,
    ) -> None:
        """Raises OSError when the port can't be had."""
        self.instance, self.rank, self.layout, self.memory = instance, rank, layout, memory
        self.owner = f"prefill instance {instance} rank {rank}"
        self.deadlines = deadlines or Deadlines()
        self.book = RoomBook()
        self._backend = backend
        self._rooms: dict[int, SenderRoom] = {}
        self._early: dict[int, list[_Early]] = {}
        self.thread = LoopThread(f"transfer thread of {self.owner}")
        try:
            self._server, self._memory = self.thread.wait(self._start(host, port), _START_S, "start")
        except BaseException:
            self.thread.close()
            raise
        self.address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]

    def sender(self, room: int, bootstrap_host: str | None = None) -> Sender:
        """A new room; `bootstrap_host` as the request has it. Raises RoomError for a room that is or was in use."""
        self.thread.check()
        if bootstrap_host == WARMUP_HOST:
            return WarmupSender(room, self.owner)
        self.book.claim(room)
        sender = SenderRoom(self, room)
        self.thread.post(self._add, sender)
        return sender

    def close(self) -> None:
        """Stop. Decode ranks see the connection end; rooms that have not ended fail there."""
        self.thread.post(self._server.close)
        self.thread.close()
        self._backend.close()

    # Transfer thread

    async def _start(self, host: str, port: int) -> tuple[asyncio.Server, bytes]:
        self._backend.start(lambda: None)
        description = self._backend.describe()
        if self._backend.needs_progress:
            self.thread.spawn(self._drive())
        server = await asyncio.start_server(lambda reader, writer: self.thread.spawn(self._accept(reader, writer)), host, port)
        self.thread.spawn(self._watch())
        return server, description

    def _add(self, room: SenderRoom) -> None:
        self._rooms[room.room] = room
        for early in self._early.pop(room.room, []):
            room.handle(early.rank, early.message)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(reader, writer, to_prefill_decoder, f"{writer.get_extra_info('peername')}")
        try:
            decode_rank = self._welcome(link, await link.receive())
            if decode_rank is not None:
                reason = await link.serve(lambda message: self._handle(decode_rank, message))
                self._lost(decode_rank, reason)
        except LinkError:
            pass  # a stranger: it has not said who it is, so no room knows it
        finally:
            await link.close()

    def _welcome(self, link: Link, message: ControlMessage) -> _DecodeRank | None:
        if not isinstance(message, Hello):
            raise LinkError(f"{link.peer} sent {type(message).__name__} where Hello was expected")
        try:
            if message.version != PROTOCOL_VERSION:
                raise LayoutMismatchError(f"protocol version differs: prefill has {PROTOCOL_VERSION}, decode has {message.version}")
            check_same_kv(self.layout, message.layout)
        except LayoutMismatchError as error:
            link.send(Refused(reason=f"{self.owner} refuses decode instance {message.instance} rank {message.rank}: {error}"))
            return None
        link.peer = f"decode instance {message.instance} rank {message.rank}"
        link.send(Welcome(instance=self.instance, rank=self.rank, layout=self.layout, memory=self._memory))
        return _DecodeRank(link, message.instance)

    def _handle(self, decode_rank: _DecodeRank, message: ControlMessage) -> None:
        if isinstance(message, Expect | Open | Done | Abort):
            room = self._rooms.get(message.room)
            if room is not None:
                room.handle(decode_rank, message)
            elif not isinstance(message, Done):
                self._handle_early(decode_rank, message)
        else:
            raise LinkError(f"{decode_rank.link.peer} sent {type(message).__name__}, which decode ranks don't send")

    def _handle_early(self, decode_rank: _DecodeRank, message: Expect | Open | Abort) -> None:
        end = self.book.end_of(message.room)
        if end is None:
            self._early.setdefault(message.room, []).append(_Early(decode_rank, message, time.monotonic()))
        elif not isinstance(message, Abort):
            refuse(decode_rank.link, message.room, f"the room has ended: {end}")

    def _forget_early(self, decode_rank: _DecodeRank, room: int) -> None:
        remaining = [early for early in self._early.pop(room, []) if early.rank is not decode_rank]
        if remaining:
            self._early[room] = remaining

    def _lost(self, decode_rank: _DecodeRank, reason: str) -> None:
        for room in list(self._early):
            self._forget_early(decode_rank, room)
        for sender in list(self._rooms.values()):
            sender.lost(decode_rank, reason)

    async def _drive(self) -> None:
        """For backends that need it, while decode ranks may be reading."""
        while True:
            await asyncio.sleep(PROGRESS_S if self._rooms else IDLE_S)
            self._backend.progress()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for room in list(self._rooms.values()):
                room.check_deadline()
            horizon = time.monotonic() - self.deadlines.bootstrapping
            for number, early in list(self._early.items()):
                if early[0].since < horizon:
                    del self._early[number]
                    for one in early:
                        if not isinstance(one.message, Abort):
                            refuse(one.rank.link, number, f"{self.owner}: the request has not come here", "deadline")

    def remove(self, room: SenderRoom) -> None:
        """The room has ended."""
        self._rooms.pop(room.room, None)
        self.book.release(room.room, str(room.failure or f"{self.owner} has handed it over"))


class SenderRoom:
    """See transfer.Sender."""

    def __init__(self, owner: PrefillTransfer, room: int) -> None:
        self.room = room
        self._owner = owner
        self._progress = RoomProgress(room, owner.owner)
        self._expected: list[_DecodeRank] = []
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

    def handle(self, decode_rank: _DecodeRank, message: Expect | Open | Done | Abort) -> None:
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

    def _expect(self, decode_rank: _DecodeRank) -> None:
        """A decode rank will open the room, unless another instance has it: that one goes on."""
        others = [*self._expected, *(reader.rank for reader in self._readers.values())]
        rival = next((other for other in others if other.instance != decode_rank.instance), None)
        if rival is None:
            self._expected.append(decode_rank)
        else:
            refuse(decode_rank.link, self.room, f"{self._owner.owner}: the room is in use by {rival.link.peer}")

    def _open(self, decode_rank: _DecodeRank, message: Open) -> None:
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

    def lost(self, decode_rank: _DecodeRank, reason: str) -> None:
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

    def _refusal(self, decode_rank: _DecodeRank, message: Open) -> str | None:
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
