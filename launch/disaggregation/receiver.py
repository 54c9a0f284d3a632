"""The decode side of all rooms of one rank: it fetches announced pages into its own, and knows when they are quiet.

Knows nothing of how pages travel (`transfer.Backend`). Only this rank writes to its pages, and only by reads that it began itself:
a room whose reads have all ended is *quiet*, and its pages may be reused, whatever has become of the other side.
"""

from __future__ import annotations

import asyncio

from moesaic.launch.disaggregation.directory import DecodeRank, PrefillDirectory, Source
from moesaic.launch.disaggregation.layout import IntArray, page_runs
from moesaic.launch.disaggregation.loop_thread import LoopThread
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.protocol import WARMUP_HOST, Abort, Closed, ControlMessage, Deadlines, Last, Pages
from moesaic.launch.disaggregation.receiver_room import ReceiverRoom
from moesaic.launch.disaggregation.rooms import RoomBook
from moesaic.launch.disaggregation.transfer import PROGRESS_S, Backend, Read, Receiver
from moesaic.launch.disaggregation.warmup import WarmupReceiver

TICK_S = 0.1


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
        """See receiver_room.RoomOwner."""
        runs = page_runs(numbers, targets)
        read = self.backend.read(source.peer, runs)
        if self.backend.needs_progress and not self._driving:
            self._driving = True
            self.thread.spawn(self._drive())
        return read, len(runs)

    def remove(self, room: ReceiverRoom) -> None:
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
