"""The decode side of all rooms of one rank: it fetches announced pages into its own, and knows when they are quiet.

Knows nothing of how pages travel (`transfer.Backend`). Only this rank writes to its pages, and only by reads that it began itself:
a room whose reads have all ended is *quiet*, and its pages may be reused, whatever has become of the other side.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moesaic.launch.disaggregation.directory import DecodeRank, PrefillDirectory, Route, Source
from moesaic.launch.disaggregation.layout import IntArray, page_runs, pages_of_source
from moesaic.launch.disaggregation.loop_thread import LoopThread
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.protocol import (
    WARMUP_HOST,
    Abort,
    Closed,
    ControlMessage,
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
from moesaic.launch.disaggregation.rooms import RoomBook, RoomProgress
from moesaic.launch.disaggregation.transfer import PROGRESS_S, Backend, Read, Receiver
from moesaic.launch.disaggregation.warmup import WarmupReceiver

TICK_S = 0.1


@dataclass(frozen=True, kw_only=True)
class TransferStats:
    """What a room's transfer took on this rank: seconds from the first announced page to the last read one."""

    num_pages: int
    num_runs: int
    num_bytes: int
    seconds: float


class DecodeTransfer:
    """One decode rank's end. `checksum`: every page is checked against what prefill had, for the price of reading it twice."""

    def __init__(
        self,
        *,
        rank: DecodeRank,
        memory: PagedMemory,
        backend: Backend,
        deadlines: Deadlines | None = None,
        checksum: bool = False,
    ) -> None:
        self.rank, self.memory, self.backend, self.checksum = rank, memory, backend, checksum
        self.deadlines = deadlines or Deadlines()
        self.book = RoomBook()
        self._rooms: dict[int, ReceiverRoom] = {}
        self.thread = LoopThread(f"transfer thread of {rank}")
        self.directory = PrefillDirectory(rank, backend, self.thread, self._handle, self._lost)
        backend.start(lambda: self.thread.post(self._collect))
        self._driving = False
        self.thread.post(lambda: self.thread.spawn(self._watch()))

    def receiver(self, room: int, bootstrap_host: str, bootstrap_port: int, dp_rank: int | None = None) -> Receiver:
        """A new room of the prefill instance with this bootstrap server. Raises RoomError for a room that is or was in use."""
        self.thread.check()
        if bootstrap_host == WARMUP_HOST:
            return WarmupReceiver(room, str(self.rank))
        self.book.claim(room)
        receiver = ReceiverRoom(self, room, f"{bootstrap_host}:{bootstrap_port}", dp_rank)
        self.thread.post(self._add, receiver)
        return receiver

    def close(self) -> None:
        """Stop. Prefill ranks see the connection end. No page is written to afterwards."""
        self.thread.close()
        self.backend.close()

    # Transfer thread

    def _add(self, room: ReceiverRoom) -> None:
        self._rooms[room.room] = room
        room.start()

    def begin(self, source: Source, targets: IntArray, numbers: IntArray) -> tuple[Read, int]:
        """Begin to read a source's pages `numbers` into `targets`; (the read, its number of runs)."""
        runs = page_runs(numbers, targets)
        read = self.backend.read(source.peer, runs)
        if self.backend.needs_progress and not self._driving:
            self._driving = True
            self.thread.spawn(self._drive())
        return read, len(runs)

    def remove(self, room: ReceiverRoom) -> None:
        """The room has ended and is quiet."""
        self._rooms.pop(room.room, None)
        self.book.release(room.room, str(room.failure or f"{self.rank} has received it"))

    def _handle(self, source: Source, message: ControlMessage) -> None:
        room = self._rooms.get(message.room) if isinstance(message, Pages | Last | Closed | Abort) else None
        if room is not None:
            room.handle(source, message)

    def _lost(self, source: Source, why: str) -> None:
        for room in list(self._rooms.values()):
            room.lost(source, why)

    def _collect(self) -> None:
        for room in list(self._rooms.values()):
            room.collect()

    async def _drive(self) -> None:
        """For backends that need it, while there are reads."""
        while any(room.num_reads for room in self._rooms.values()):
            await asyncio.sleep(PROGRESS_S)
            self.backend.progress()
            self._collect()
        self._driving = False

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for room in list(self._rooms.values()):
                room.check_deadline()


@dataclass(eq=False)
class _Stream:
    """What one source has said of a room. `index`: of the source among the room's sources."""

    source: Source
    index: int
    num_pages: int = 0
    last: Last | None = None
    closed: bool = False


@dataclass(eq=False)
class _Fetch:
    """A read under way: pages with these numbers here are to have these checksums (empty: not checked)."""

    read: Read
    targets: list[int]
    checksums: list[int]


@dataclass
class _Counts:
    """For TransferStats."""

    num_pages: int = 0
    num_runs: int = 0
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0


class ReceiverRoom:
    """See transfer.Receiver. `stats` counts what this rank has fetched."""

    def __init__(self, owner: DecodeTransfer, room: int, address: str, dp_rank: int | None) -> None:
        self.room = room
        self.metadata = b""
        self._owner = owner
        self._address = address
        self._dp_rank = dp_rank
        self._progress = RoomProgress(room, str(owner.rank))
        self._search: asyncio.Task[None] | None = None
        self._streams: dict[Source, _Stream] = {}
        self._num_receivers: tuple[int, ...] = ()
        self._targets: IntArray | None = None
        self._first_index = 0
        self._fetches: list[_Fetch] = []
        self._counts = _Counts()
        self._done_sent = False
        self._quiet = False

    # The engine's thread

    @property
    def state(self) -> TransferState:
        return self._progress.state

    @property
    def failure(self) -> TransferError | None:
        return self._progress.failure

    @property
    def quiet(self) -> bool:
        return self._quiet

    @property
    def stats(self) -> TransferStats:
        counts = self._counts
        num_bytes = counts.num_pages * self._owner.memory.page_bytes
        seconds = max(counts.ended - counts.began, 0.0)
        return TransferStats(num_pages=counts.num_pages, num_runs=counts.num_runs, num_bytes=num_bytes, seconds=seconds)

    def receive(self, pages: npt.ArrayLike, first_index: int = 0) -> None:
        self._owner.thread.post(self._receive, np.asarray(pages, dtype=np.int64), first_index)

    def abort(self, reason: str) -> None:
        if self._progress.give_up(reason):
            self._owner.thread.post(self._fail, "aborted", reason)

    # The transfer thread

    @property
    def num_reads(self) -> int:
        return len(self._fetches)

    def start(self) -> None:
        """Find the sources."""
        self._search = self._owner.thread.spawn(self._find_sources())

    def handle(self, source: Source, message: ControlMessage) -> None:
        stream = self._streams.get(source)
        if stream is None or self._progress.ended:
            return
        if isinstance(message, Pages):
            self._fetch(stream, message)
        elif isinstance(message, Last):
            stream.last = message
            self._progress.touch()
            self._advance_to_done()
        elif isinstance(message, Closed):
            self._close(stream)
        elif isinstance(message, Abort):
            stream.closed = True  # it has ended the room itself
            self._fail(message.kind, f"{source.link.peer} has given it up: {message.reason}")

    def lost(self, source: Source, why: str) -> None:
        """The connection to a source is over."""
        stream = self._streams.get(source)
        if stream is not None and not stream.closed:
            stream.closed = True
            self._fail("lost", why)

    def collect(self) -> None:
        """Look which reads have ended."""
        ended = [fetch for fetch in self._fetches if fetch.read.ended]
        if not ended:
            return
        self._fetches = [fetch for fetch in self._fetches if not fetch.read.ended]
        for fetch in ended:
            if not self._progress.ended:
                self._take(fetch)
        self._advance_to_done()
        self._settle()

    def check_deadline(self) -> None:
        limit = self._progress.overdue(self._owner.deadlines)
        if limit is not None:
            waits_for = {
                TransferState.BOOTSTRAPPING: self._owner.directory.problems.get(self._address, f"no answer from {self._address}"),
                TransferState.WAITING: f"{self._peers()} sent no page; pages to receive them: {self._num_targets()}",
                TransferState.TRANSFERRING: f"{len(self._fetches)} reads from {self._peers()} have not ended",
            }[self._progress.stage]
            self._fail("deadline", f"stuck for {limit:g} s: {waits_for}")

    async def _find_sources(self) -> None:
        try:
            seconds = self._owner.deadlines.bootstrapping
            route = await self._owner.directory.route(self._address, self.room, self._dp_rank, seconds)
        except TransferError as error:
            self._fail(error.kind, str(error))
            return
        if not self._progress.ended:
            self._connected(route)
            return
        for source in route.sources:  # it was given up meanwhile, and prefill still waits for it
            source.link.send(Abort(room=self.room, kind="aborted", reason=str(self.failure)))

    def _connected(self, route: Route) -> None:
        self._streams = {source: _Stream(source, index) for index, source in enumerate(route.sources)}
        self._num_receivers = route.num_receivers
        for stream in self._streams.values():
            stream.source.link.send(Expect(room=self.room))
        self._progress.advance(TransferState.WAITING)
        if self._targets is not None:
            self._open()

    def _receive(self, pages: IntArray, first_index: int) -> None:
        assert self._targets is None, f"room {self.room} has its pages already"
        if self._progress.ended:
            return
        self._targets, self._first_index = pages, first_index
        if self._streams:
            self._progress.touch()
            self._open()

    def _open(self) -> None:
        rank = self._owner.rank
        for stream, num_receivers in zip(self._streams.values(), self._num_receivers, strict=True):
            stream.source.link.send(
                Open(
                    room=self.room,
                    receiver=rank.attn_tp_rank,
                    num_receivers=num_receivers,
                    first_index=self._first_index,
                    checksum=self._owner.checksum,
                )
            )

    def _fetch(self, stream: _Stream, pages: Pages) -> None:
        """Begin to read those of the announced pages that this source is to serve and this rank lacks."""
        if self._targets is None:
            self._fail("corrupt", f"{stream.source.link.peer} announced pages before the room was opened")
            return
        if self._progress.stage is TransferState.WAITING:
            self._progress.advance(TransferState.TRANSFERRING)
            self._counts.began = time.monotonic()
        self._progress.touch()
        end = pages.first_index + len(pages.numbers)
        if pages.first_index != stream.num_pages or stream.last is not None:
            name = stream.source.link.peer
            self._fail("corrupt", f"{name} announced page {pages.first_index} of the sequence, expected page {stream.num_pages}")
            return
        if end > self._first_index + len(self._targets):
            room_for = self._first_index + len(self._targets)
            self._fail("corrupt", f"{stream.source.link.peer} announced {end} pages, there is room for {room_for}")
            return
        stream.num_pages = end
        indices = pages_of_source(pages.first_index, len(pages.numbers), stream.index, len(self._streams), self.room)
        indices = indices[indices >= self._first_index]
        if len(indices):
            self._begin(stream.source, pages, indices)

    def _begin(self, source: Source, pages: Pages, indices: IntArray) -> None:
        assert self._targets is not None
        offsets = indices - pages.first_index
        targets = self._targets[indices - self._first_index]
        numbers = np.asarray(pages.numbers, dtype=np.int64)[offsets]
        read, num_runs = self._owner.begin(source, targets, numbers)
        checksums = [pages.checksums[offset] for offset in offsets.tolist()] if pages.checksums else []
        self._fetches.append(_Fetch(read, targets.tolist(), checksums))
        self._counts.num_runs += num_runs
        if read.ended:
            self.collect()

    def _take(self, fetch: _Fetch) -> None:
        """The pages of a read have arrived, or not."""
        if fetch.read.error is not None:
            self._fail("lost", fetch.read.error)
            return
        for page, expected in zip(fetch.targets, fetch.checksums, strict=bool(fetch.checksums)):
            found = self._owner.memory.checksum(page)
            if found != expected:
                self._fail("corrupt", f"page {page} arrived changed: checksum {found:08x}, prefill has {expected:08x}")
                return
        self._counts.num_pages += len(fetch.targets)
        self._counts.ended = time.monotonic()
        self._progress.touch()

    def _advance_to_done(self) -> None:
        """Once all has been announced and read, say so; prefill's answer is the end."""
        if self._progress.ended or self._done_sent or self._fetches or not self._streams:
            return
        if any(stream.last is None for stream in self._streams.values()):
            return
        expected = self._first_index + self._num_targets()
        for stream in self._streams.values():
            assert stream.last is not None
            if not stream.num_pages == stream.last.num_pages == expected:
                counts = f"announced {stream.num_pages} of {stream.last.num_pages} pages, {expected} were expected"
                self._fail("corrupt", f"{stream.source.link.peer} {counts}")
                return
        assert self._counts.num_pages == self._num_targets(), "every page is fetched once"
        if self._progress.stage is TransferState.WAITING:
            self._progress.advance(TransferState.TRANSFERRING)
        self._done_sent = True
        for stream in self._streams.values():
            stream.source.link.send(Done(room=self.room))

    def _close(self, stream: _Stream) -> None:
        if not self._done_sent:
            self._fail("corrupt", f"{stream.source.link.peer} has closed the room before all was read")
            return
        stream.closed = True
        if all(other.closed for other in self._streams.values()):
            assert stream.last is not None
            self.metadata = stream.last.metadata
            self._progress.advance(TransferState.SUCCESS)
            self._settle()

    def _fail(self, kind: FailureKind, why: str) -> None:
        if self._progress.ended:
            return
        self._progress.fail(kind, why)
        # A search goes on for a room that was given up: prefill is to hear of it.
        if self._search is not None and self._search is not asyncio.current_task() and kind != "aborted":
            self._search.cancel()
        for stream in self._streams.values():
            if not stream.closed:
                stream.source.link.send(Abort(room=self.room, kind=kind, reason=str(self.failure)))
        for fetch in self._fetches:
            fetch.read.cancel()
        self._settle()

    def _settle(self) -> None:
        """Quiet once the room has ended and so have its reads."""
        self._fetches = [fetch for fetch in self._fetches if not fetch.read.ended]
        if self._progress.ended and not self._fetches and not self._quiet:
            self._quiet = True
            self._owner.remove(self)

    def _num_targets(self) -> int:
        return 0 if self._targets is None else len(self._targets)

    def _peers(self) -> str:
        return ", ".join(stream.source.link.peer for stream in self._streams.values())
