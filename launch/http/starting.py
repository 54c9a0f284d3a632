"""Answers on the server's port while its ranks start: 503 with what they are doing, so that no probe or person is left hanging.

The port listens from the first moment (a taken one is known before weights are read), so someone must answer there. Knows no ranks
and no routes: whatever is asked, the answer is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import msgspec

from moesaic.launch.http.errors import unavailable

REQUEST_SECONDS = 5.0
MAX_HEAD_BYTES = 64 << 10


@contextlib.asynccontextmanager
async def answer_while_starting(listener: socket.socket, doing: Callable[[], str]) -> AsyncIterator[None]:
    """While the context lasts; `listener` listens on afterwards. `doing`: what the ranks do now, in words."""

    under_way: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        under_way.add(task)
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                async with asyncio.timeout(REQUEST_SECONDS):
                    await _refuse(reader, writer, f"the server is starting: {doing()}")
        finally:
            writer.transport.abort()
            under_way.discard(task)

    # The server closes the socket that it is given, so it gets one of its own.
    server = await asyncio.start_server(answer, sock=listener.dup(), limit=MAX_HEAD_BYTES)
    try:
        yield
    finally:
        server.close()
        for task in tuple(under_way):
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: str) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(_response(message))
    writer.write_eof()
    # A connection that is closed over unread bytes is reset, and the client would not see the answer.
    while await reader.read(MAX_HEAD_BYTES):
        pass


def _response(message: str) -> bytes:
    body = msgspec.json.encode(unavailable(message).body())
    head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
