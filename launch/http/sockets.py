"""The ZMQ sockets between the HTTP process and the ranks: one PUSH to each rank, one PULL from all.

Both are bound here and the ranks connect, so that ranks of any node find one address. Knows messages, not what they
mean. Sending never waits: messages queue without limit inside ZMQ, in order, and a rank that is gone is an error at
once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import zmq
import zmq.asyncio

from moesaic.launch.engine.messages import FromRank, ToRank, encoder, from_rank_decoder


class RankGoneError(Exception):
    """No connection to this rank."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} is not connected")
        self.rank = rank


class RankSockets:
    """Binds in the constructor, before any rank starts. `receive` needs a running event loop, `send` does not."""

    def __init__(self, to_rank_endpoints: Sequence[str], from_rank_endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._to_rank = [self._bind(zmq.PUSH, endpoint) for endpoint in to_rank_endpoints]
        self._from_rank = self._bind(zmq.PULL, from_rank_endpoint)
        self._receiver: zmq.asyncio.Socket | None = None

    def _bind(self, kind: int, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        socket.linger = 0
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise OSError(f"cannot bind {endpoint}: {error}") from error
        return socket

    def send(self, ranks: Iterable[int], message: ToRank) -> None:
        """The same bytes to every rank of `ranks`. Raises RankGoneError for the first that is not connected."""
        data = encoder.encode(message)
        for rank in ranks:
            try:
                self._to_rank[rank].send(data, zmq.NOBLOCK)
            except zmq.Again:
                raise RankGoneError(rank) from None

    def connected(self, rank: int) -> bool:
        return bool(self._to_rank[rank].poll(0, zmq.POLLOUT))

    async def receive(self) -> FromRank:
        if self._receiver is None:
            self._receiver = zmq.asyncio.Socket.from_socket(self._from_rank)
        return from_rank_decoder.decode(await self._receiver.recv())

    def close(self, flush_seconds: float = 0.0) -> None:
        """Close everything; wait up to `flush_seconds` for the last messages (such as a shutdown) to leave."""
        started = time.monotonic()
        for socket in self._to_rank:
            left = max(0.0, flush_seconds - (time.monotonic() - started))
            socket.close(linger=int(left * 1000))
        if self._receiver is not None:
            self._receiver.close(linger=0)
        self._from_rank.close(linger=0)
        self._context.term()
