"""Framing of a control connection: length, sequence number and checksum before every message.

Knows no sockets and no messages: bytes in, bytes out. What TCP itself can't see is seen here: a frame that comes twice or not at
all (a proxy, a bug, another program on the port), one that is cut off, and bytes that are no frame.
"""

from __future__ import annotations

import struct
import zlib

MAGIC = b"MKV1"
MAX_FRAME_BYTES = 64 << 20
_HEADER = struct.Struct("<4sIQI")
HEADER_BYTES = _HEADER.size


class FrameError(ValueError):
    """What arrived is not the next frame of this connection."""


class FrameWriter:
    """Numbers outgoing frames."""

    def __init__(self) -> None:
        self._sequence = 0

    def frame(self, payload: bytes) -> bytes:
        """The payload with its header. Raises FrameError for one that is too long."""
        if len(payload) > MAX_FRAME_BYTES:
            raise FrameError(f"a message of {len(payload)} bytes: at most {MAX_FRAME_BYTES} travel in one frame")
        header = _HEADER.pack(MAGIC, len(payload), self._sequence, zlib.crc32(payload))
        self._sequence += 1
        return header + payload


class FrameReader:
    """Checks incoming frames. Header and payload come in turns."""

    def __init__(self) -> None:
        self._sequence = 0
        self._checksum = 0

    def header(self, header: bytes) -> int:
        """The length of the payload that follows. Raises FrameError for a frame that is not the next one."""
        magic, length, sequence, self._checksum = _HEADER.unpack(header)
        if magic != MAGIC:
            raise FrameError(f"no frame: it begins with {magic!r}, not {MAGIC!r}")
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {length} bytes: at most {MAX_FRAME_BYTES} are allowed")
        if sequence < self._sequence:
            raise FrameError(f"frame {sequence} came again, expected frame {self._sequence}")
        if sequence > self._sequence:
            raise FrameError(f"frame {self._sequence} is missing, frame {sequence} came instead")
        self._sequence += 1
        return int(length)

    def payload(self, payload: bytes) -> bytes:
        """The payload itself. Raises FrameError when it is not what was sent."""
        if zlib.crc32(payload) != self._checksum:
            raise FrameError(f"frame {self._sequence - 1} of {len(payload)} bytes arrived changed (checksum)")
        return payload
