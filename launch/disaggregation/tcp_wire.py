"""What the tcp transport says on a connection, and how whole pieces of memory are sent and received.

All numbers are little-endian:

    decode:   request  magic, read number, number of runs, then per run: first page, number of pages
    prefill:  per run  magic, read number, run number, status, length, then `length` bytes: the run's pages, layer by layer
                       (status 1: the run can't be served, the bytes say why)

Knows no pages: memory is views of bytes.
"""

from __future__ import annotations

import socket
import struct

MAGIC = b"MKP1"
REQUEST = struct.Struct("<4sQI")
RUN = struct.Struct("<II")
ANSWER = struct.Struct("<4sQIIQ")
MAX_RUNS = 1 << 20
MAX_VIEWS = 512
"""Pieces of memory per system call; Linux takes 1024."""
CLOSE_S = 5.0
"""A thread whose connection was closed has ended by then."""
STALLED_S = 10.0
"""A transfer of which not one byte moves for so long is over: the other side, or something between, holds it."""


class WireError(ConnectionError):
    """What came over a connection is not what the protocol says, or it ended."""


def tune(connection: socket.socket, stalled_s: float, *waits: int) -> None:
    """Calls block, but those of these kinds (SO_RCVTIMEO, SO_SNDTIMEO) raise BlockingIOError when no byte moves for `stalled_s`.

    The system keeps that time: with one of Python's, sockets don't block, and MSG_WAITALL waits for nothing.
    """
    connection.settimeout(None)
    for kind in waits:
        connection.setsockopt(socket.SOL_SOCKET, kind, struct.pack("ll", int(stalled_s), int(stalled_s % 1 * 1e6)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def send_all(connection: socket.socket, views: list[memoryview]) -> None:
    """All of the views in as few calls as there can be: each costs a wait for Python's lock, which a forward may hold."""
    while views:
        views = _rest(views, connection.sendmsg(views[:MAX_VIEWS]))


def fill_all(connection: socket.socket, views: list[memoryview]) -> None:
    """As `_fill`, into several views, in as few calls as there can be."""
    length = sum(map(len, views))
    while views:
        count, _, _, _ = connection.recvmsg_into(views[:MAX_VIEWS], 0, socket.MSG_WAITALL)
        if count == 0:
            raise WireError(f"the connection ended when {length - sum(map(len, views))} of {length} bytes of a run had come")
        views = _rest(views, count)


def _rest(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the views after so many bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def fill(connection: socket.socket, view: memoryview) -> None:
    """Receive exactly as many bytes as the view has, into it. Raises WireError when the connection ends before."""
    received = 0
    while received < len(view):
        count = connection.recv_into(view[received:], 0, socket.MSG_WAITALL)
        if count == 0:
            raise WireError(f"the connection ended when {received} of {len(view)} bytes of a piece had come")
        received += count
