"""One room on a decode rank: from the search for its prefill ranks to the last page and prefill's word that it counts.

Knows nothing of other rooms, and of its rank what `RoomOwner` says. See transfer.Receiver.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moesaic.launch.disaggregation.announced import Announced
from moesaic.launch.disaggregation.directory import DecodeRank, PrefillDirectory, Route, Source
from moesaic.launch.disaggregation.layout import IntArray
from moesaic.launch.disaggregation.loop_thread import LoopThread
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.protocol import (
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
from moesaic.launch.disaggregation.room_reads import Fetch, RoomReads, TransferStats
from moesaic.launch.disaggregation.rooms import RoomProgress
from moesaic.launch.disaggregation.transfer import Read


class RoomOwner(Protocol):
    """What a room needs of its rank."""

    rank: DecodeRank
    memory: PagedMemory
    checksum: bool
    deadlines: Deadlines
    thread: LoopThread
    directory: PrefillDirectory

    def begin(self, source: Source, targets: IntArray, numbers: IntArray) -> tuple[Read, int]:
        """Begin to read a source's pages `numbers` into `targets`; (the read, its number of runs)."""
        ...

    def remove(self, room: ReceiverRoom) -> None:
        """The room has ended and is quiet."""
        ...


class ReceiverRoom:
    """See transfer.Receiver. `stats` counts what this rank has fetched."""

    def __init__(self, owner: RoomOwner, room: int, address: str, dp_rank: int | None) -> None:
        self.room = room
        self.metadata = b""
        self._owner = owner
        self._address = address
        self._dp_rank = dp_rank
        self._progress = RoomProgress(room, str(owner.rank))
        self._search: asyncio.Task[None] | None = None
        self._streams: dict[Source, Announced] = {}
        self._num_receivers: tuple[int, ...] = ()
        self._targets: IntArray | None = None
        self._first_index = 0
        self._reads = RoomReads(owner.memory)
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
        return self._reads.stats

    def receive(self, pages: npt.ArrayLike, first_index: int = 0) -> None:
        self._owner.thread.post(self._receive, np.asarray(pages, dtype=np.int64), first_index)

    def abort(self, reason: str) -> None:
        if self._progress.give_up(reason):
            self._owner.thread.post(self._fail, "aborted", reason)

    # The transfer thread

    @property
    def num_reads(self) -> int:
        return len(self._reads)

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
        ended = self._reads.take_ended()
        if not ended:
            return
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
                TransferState.TRANSFERRING: f"{len(self._reads)} reads from {self._peers()} have not ended",
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
        self._streams = {source: Announced(source, index, len(route.sources)) for index, source in enumerate(route.sources)}
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

    def _fetch(self, stream: Announced, pages: Pages) -> None:
        """Begin to read those of the announced pages that this source is to serve and this rank lacks."""
        if self._targets is None:
            self._fail("corrupt", f"{stream.peer} announced pages before the room was opened")
            return
        if self._progress.stage is TransferState.WAITING:
            self._progress.advance(TransferState.TRANSFERRING)
            self._reads.start_clock()
        self._progress.touch()
        problem = stream.add(pages, self._num_expected())
        if problem is not None:
            self._fail("corrupt", problem)
            return
        indices = stream.to_read(pages, self._first_index)
        if len(indices):
            self._begin(stream.source, pages, indices, self._targets[indices - self._first_index])

    def _begin(self, source: Source, pages: Pages, indices: IntArray, targets: IntArray) -> None:
        """Read the announced pages with these indices in the sequence into `targets`."""
        offsets = indices - pages.first_index
        numbers = np.asarray(pages.numbers, dtype=np.int64)[offsets]
        read, num_runs = self._owner.begin(source, targets, numbers)
        checksums = [pages.checksums[offset] for offset in offsets.tolist()] if pages.checksums else []
        self._reads.add(Fetch(peer=source.link.peer, read=read, targets=targets.tolist(), checksums=checksums), num_runs)
        if read.ended:
            self.collect()

    def _take(self, fetch: Fetch) -> None:
        """The pages of a read have arrived, or not."""
        problem = self._reads.check(fetch)
        if problem is None:
            self._progress.touch()
        else:
            self._fail(*problem)

    def _advance_to_done(self) -> None:
        """Once all has been announced and read, say so; prefill's answer is the end."""
        if self._progress.ended or self._done_sent or self._reads or not self._streams:
            return
        if any(stream.last is None for stream in self._streams.values()):
            return
        for stream in self._streams.values():
            problem = stream.miscount(self._num_expected())
            if problem is not None:
                self._fail("corrupt", problem)
                return
        assert self._reads.num_arrived == self._num_targets(), "every page is fetched once"
        if self._progress.stage is TransferState.WAITING:
            self._progress.advance(TransferState.TRANSFERRING)
        self._done_sent = True
        for stream in self._streams.values():
            stream.source.link.send(Done(room=self.room))

    def _close(self, stream: Announced) -> None:
        if not self._done_sent:
            self._fail("corrupt", f"{stream.peer} has closed the room before all was read")
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
        self._reads.cancel()
        self._settle()

    def _settle(self) -> None:
        """Quiet once the room has ended and so have its reads."""
        if not self._progress.ended or self._quiet:
            return
        self._reads.take_ended()
        if not self._reads:
            self._quiet = True
            self._owner.remove(self)

    def _num_targets(self) -> int:
        return 0 if self._targets is None else len(self._targets)

    def _num_expected(self) -> int:
        """The sequence's pages, those that are here already included."""
        return self._first_index + self._num_targets()

    def _peers(self) -> str:
        return ", ".join(stream.peer for stream in self._streams.values())
