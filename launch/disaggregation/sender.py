"""The prefill side of all rooms of one rank: it announces complete pages to the decode ranks and hears when they have been read.

Knows nothing of how pages travel (`transfer.Backend`). The pages of a room are only ever read from here, and a decode rank takes
what it has read for good only after `Closed`: a room that is given up needs no wait, its pages may be reused at once.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from moesaic.launch.disaggregation.link import Link, LinkError
from moesaic.launch.disaggregation.loop_thread import LoopThread
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.protocol import (
    PROTOCOL_VERSION,
    WARMUP_HOST,
    Abort,
    ControlMessage,
    Deadlines,
    Done,
    Expect,
    Hello,
    KVLayout,
    LayoutMismatchError,
    Open,
    Refused,
    Welcome,
    check_same_kv,
    to_prefill_decoder,
)
from moesaic.launch.disaggregation.rooms import RoomBook
from moesaic.launch.disaggregation.sender_room import DecodePeer, SenderRoom, refuse
from moesaic.launch.disaggregation.transfer import PROGRESS_S, Backend, Sender
from moesaic.launch.disaggregation.warmup import WarmupSender

TICK_S = 0.1
IDLE_S = 0.01
_START_S = 10.0


@dataclass(frozen=True)
class _Early:
    """What a decode rank has said of a room before the request was here."""

    rank: DecodePeer
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

    def _welcome(self, link: Link, message: ControlMessage) -> DecodePeer | None:
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
        return DecodePeer(link, message.instance)

    def _handle(self, decode_rank: DecodePeer, message: ControlMessage) -> None:
        if isinstance(message, Expect | Open | Done | Abort):
            room = self._rooms.get(message.room)
            if room is not None:
                room.handle(decode_rank, message)
            elif not isinstance(message, Done):
                self._handle_early(decode_rank, message)
        else:
            raise LinkError(f"{decode_rank.link.peer} sent {type(message).__name__}, which decode ranks don't send")

    def _handle_early(self, decode_rank: DecodePeer, message: Expect | Open | Abort) -> None:
        end = self.book.end_of(message.room)
        if end is None:
            self._early.setdefault(message.room, []).append(_Early(decode_rank, message, time.monotonic()))
        elif not isinstance(message, Abort):
            refuse(decode_rank.link, message.room, f"the room has ended: {end}")

    def _forget_early(self, decode_rank: DecodePeer, room: int) -> None:
        remaining = [early for early in self._early.pop(room, []) if early.rank is not decode_rank]
        if remaining:
            self._early[room] = remaining

    def _lost(self, decode_rank: DecodePeer, reason: str) -> None:
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
        """See sender_room.RoomOwner."""
        self._rooms.pop(room.room, None)
        self.book.release(room.room, str(room.failure or f"{self.owner} has handed it over"))
