"""A matrix as a picture: the colour ramp of the heat maps, and a PNG image of them without any library.

One ramp for paper, light and dark pages: lightness rises evenly from navy (idle) to pale yellow (overloaded), so that order
survives greyscale printing and the common colour blindnesses.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

RAMP = ("#141b3c", "#432b73", "#8a3387", "#cf4a70", "#f38a4c", "#fbe08c")
"""Anchors at even distances."""


def colour_limit(values: NDArray[np.float64]) -> float:
    """The value the ramp ends at: the largest one, in steps of a half, but from 2 to 4 so that the even load stays in sight."""
    return float(np.clip(np.ceil(values.max(initial=0.0) * 2) / 2, 2.0, 4.0))


def png_data_uri(values: NDArray[np.float64], limit: float) -> str:
    """values [rows, columns] as `data:image/png;base64,...`, a pixel per value.

    The ramp runs from 0 to `limit`; higher values take its last colour.
    """
    pixels = _colours(values / limit)
    num_rows, num_columns, _ = pixels.shape
    # Each scan line begins with its filter type, 0: none.
    lines = np.hstack([np.zeros((num_rows, 1), dtype=np.uint8), pixels.reshape(num_rows, num_columns * 3)])
    header = struct.pack(">IIBBBBB", num_columns, num_rows, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _colours(fractions: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Fractions [...] of the ramp -> RGB uint8 [..., 3]."""
    anchors = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in RAMP])
    at = np.linspace(0.0, 1.0, len(RAMP))
    channels = [np.interp(fractions, at, anchors[:, channel]) for channel in range(3)]
    colours: NDArray[np.uint8] = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return colours


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
