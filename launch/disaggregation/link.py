"""One control connection between a decode rank and a prefill rank: messages both ways, and a watch on whether the other side lives.

Knows framing and the protocol's messages, no rooms. Everything here runs in one event loop. Both sides ping; a side that
hears nothing for `SILENCE_S` takes the other for dead, so a killed process is noticed at once (its connection closes) and a frozen
or unplugged one within 5 s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from moesaic.launch.disaggregation.frames import HEADER_BYTES, FrameError, FrameReader, FrameWriter
from moesaic.launch.disaggregation.protocol import ControlMessage, Ping, ToDecode, ToPrefill, encoder

PING_S = 1.0
SILENCE_S = 4.0
MAX_BACKLOG_BYTES = 256 << 20


class LinkError(ConnectionError):
    """The connection is over; the message says why."""


class Link:
    """`peer` names the other side in errors; it is set once the other side has said who it is."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: msgspec.msgpack.Decoder[ToPrefill] | msgspec.msgpack.Decoder[ToDecode],
        peer: str,
    ) -> None:
        self.peer = peer
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        self._outgoing = FrameWriter()
        self._incoming = FrameReader()

    def send(self, message: ControlMessage) -> None:
        """Doesn't wait. What is sent on a broken connection is lost: `serve` says so to the owner of the link."""
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > MAX_BACKLOG_BYTES:
            self._writer.transport.abort()
            return
        self._writer.write(self._outgoing.frame(encoder.encode(message)))

    async def receive(self) -> ControlMessage:
        """The next message. Raises LinkError when the connection ends, is silent for too long, or brings what is no message."""
        try:
            async with asyncio.timeout(SILENCE_S):
                length = self._incoming.header(await self._reader.readexactly(HEADER_BYTES))
                return self._decoder.decode(self._incoming.payload(await self._reader.readexactly(length)))
        except TimeoutError as error:
            raise LinkError(f"no sign of life from {self.peer} for {SILENCE_S:g} s") from error
        except asyncio.IncompleteReadError as error:
            cut = f" in the middle of a frame ({len(error.partial)} of {error.expected} bytes)" if error.partial else ""
            raise LinkError(f"{self.peer} has closed the connection{cut}") from error
        except (FrameError, msgspec.MsgspecError) as error:
            raise LinkError(f"{self.peer} sent what can't be understood: {error}") from error
        except OSError as error:
            raise LinkError(f"the connection to {self.peer} broke: {error}") from error

    async def serve(self, handle: Callable[[ControlMessage], None]) -> str:
        """Hand every message but pings to `handle` until the connection is over; returns why."""
        pings = asyncio.ensure_future(self._ping())
        try:
            while True:
                message = await self.receive()
                if not isinstance(message, Ping):
                    handle(message)
        except LinkError as error:
            return str(error)
        finally:
            pings.cancel()

    async def close(self) -> None:
        """What was sent before still goes out, if it can at once."""
        self._writer.close()
        try:
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self._writer.transport.abort()

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            self.send(Ping())
