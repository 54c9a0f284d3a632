"""The transport that needs nothing: pages over TCP, from one process's KV memory into another's, without a copy in between.

A prefill rank serves its pages to whoever connects; a decode rank has one connection and one thread per prefill rank. On the wire,
all numbers little-endian:

    decode:   request  magic, read number, number of runs, then per run: first page, number of pages
    prefill:  per run  magic, read number, run number, status, length, then `length` bytes: the run's pages, layer by layer
                       (status 1: the run can't be served, the bytes say why)

A run that comes twice, out of turn, too short or too long is noticed, and ends the connection and all its reads. CPU memory only.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence

from moesaic.launch.disaggregation.layout import PageRun
from moesaic.launch.disaggregation.memory import PagedMemory

MAGIC = b"MKP1"
_REQUEST = struct.Struct("<4sQI")
_RUN = struct.Struct("<II")
_ANSWER = struct.Struct("<4sQIIQ")
MAX_RUNS = 1 << 20
MAX_VIEWS = 512
"""Pieces of memory per system call; Linux takes 1024."""
CONNECT_S = 3.0
_CLOSE_S = 5.0


class WireError(ConnectionError):
    """What came over a connection is not what the protocol says, or it ended."""


class TcpRead:
    """See transfer.Read."""

    def __init__(self, number: int, runs: Sequence[PageRun]) -> None:
        self.number = number
        self.runs = runs
        self.ended = False
        self.error: str | None = None
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def end(self, error: str | None) -> None:
        self.error = error
        self.ended = True


class TcpBackend:
    """See transfer.Backend. Serves on `host`, at a free port, once it has been asked to describe itself."""

    name = "tcp"
    needs_progress = False

    def __init__(self, memory: PagedMemory, host: str = "127.0.0.1") -> None:
        """Raises ValueError for GPU memory."""
        if memory.device_index is not None:
            raise ValueError("the tcp transport moves CPU memory only; use --disaggregation-transfer-backend nixl or mooncake")
        self._memory = memory
        self._host = host
        self._changed: Callable[[], None] = lambda: None
        self._server: _Server | None = None
        self._peers: dict[str, _Peer] = {}
        self._leaving: list[_Peer] = []
        self._num_reads = 0

    def start(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    def progress(self) -> None:
        """Not needed: there are threads."""

    def describe(self) -> bytes:
        if self._server is None:
            self._server = _Server(self._memory, self._host)
        host, port = self._server.address
        return f"{host}:{port}".encode()

    def connect(self, peer: str, description: bytes) -> None:
        host, _, port = description.decode(errors="replace").rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(
                f"{peer} does not serve pages over tcp ({description[:100]!r}): use one transfer backend on both sides"
            )

        self._peers[peer] = _Peer(peer, (host, int(port)), self._memory, self._changed)

    def read(self, peer: str, runs: Sequence[PageRun]) -> TcpRead:
        read = TcpRead(self._num_reads, runs)
        self._num_reads += 1
        self._peers[peer].submit(read)
        return read

    def disconnect(self, peer: str) -> None:
        gone = self._peers.pop(peer, None)
        if gone is not None:
            gone.stop()
            self._leaving = [*(other for other in self._leaving if other.alive), gone]

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        for gone in self._leaving:
            gone.join()
        if self._server is not None:
            self._server.close()


class _Peer:
    """One prefill rank's pages: reads go in, their pages come back in the same order."""

    def __init__(self, name: str, address: tuple[str, int], memory: PagedMemory, changed: Callable[[], None]) -> None:
        self._name = name
        self._memory = memory
        self._changed = changed
        self._waiting: queue.SimpleQueue[TcpRead | None] = queue.SimpleQueue()
        self._requested: deque[TcpRead] = deque()
        self._lock = threading.Lock()
        self._stopped = False
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, args=(address,), name=f"reads from {name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, read: TcpRead) -> None:
        with self._lock:
            if not self._stopped:
                self._waiting.put(read)
                return
        read.end(f"the connection to {self._name} is closed")
        self._changed()

    def stop(self) -> None:
        """Break the connection; reads under way end with an error, soon."""
        with self._lock:
            self._stopped = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
        self._waiting.put(None)

    def join(self) -> None:
        self._thread.join(_CLOSE_S)
        assert not self._thread.is_alive(), f"reads from {self._name} have not ended within {_CLOSE_S} s"

    def _run(self, address: tuple[str, int]) -> None:
        reason = "the connection was closed"
        try:
            with socket.create_connection(address, CONNECT_S) as connection:
                connection.settimeout(None)
                _tune(connection)
                with self._lock:
                    self._socket = connection
                    stopped = self._stopped
                while not stopped and self._request(connection):
                    self._receive(connection, self._requested[0])
                    self._end(self._requested.popleft(), None)
        except OSError as error:  # WireError too
            reason = str(error) or type(error).__name__
        with self._lock:
            self._stopped, self._socket = True, None
        self._fail_all(f"reading pages from {self._name} failed: {reason}")

    def _request(self, connection: socket.socket) -> bool:
        """Ask for all reads that wait, so that answers follow each other without a pause. False when told to stop."""
        while not self._requested or not self._waiting.empty():
            read = self._waiting.get()
            if read is None:
                return False
            if read.cancelled:
                self._end(read, "given up before it began")
                continue
            runs = b"".join(_RUN.pack(run.source, run.num_pages) for run in read.runs)
            connection.sendall(_REQUEST.pack(MAGIC, read.number, len(read.runs)) + runs)
            self._requested.append(read)
        return True

    def _receive(self, connection: socket.socket, read: TcpRead) -> None:
        for index, run in enumerate(read.runs):
            header = bytearray(_ANSWER.size)
            _fill(connection, memoryview(header))
            magic, number, run_index, status, length = _ANSWER.unpack(header)
            if (magic, number, run_index) != (MAGIC, read.number, index):
                raise WireError(f"run {run_index} of read {number} came, expected run {index} of read {read.number}")
            if status:
                text = bytearray(min(length, 1000))
                _fill(connection, memoryview(text))
                raise WireError(text.decode(errors="replace"))
            if length != run.num_pages * self._memory.page_bytes:
                raise WireError(f"a run of {run.num_pages} pages has {length} bytes, not {run.num_pages * self._memory.page_bytes}")
            _fill_all(connection, self._memory.views(run.target, run.num_pages))

    def _end(self, read: TcpRead, error: str | None) -> None:
        read.end(error)
        self._changed()

    def _fail_all(self, error: str) -> None:
        while self._requested:
            self._end(self._requested.popleft(), error)
        while not self._waiting.empty():
            read = self._waiting.get()
            if read is not None:
                self._end(read, error)


class _Server:
    """Serves runs of pages; one thread per connection."""

    def __init__(self, memory: PagedMemory, host: str) -> None:
        self._memory = memory
        self._listener = socket.create_server((host, 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._closed = False
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._thread = threading.Thread(target=self._accept, name="pages over tcp", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections = dict(self._connections)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in (self._thread, *connections.values()):
            thread.join(_CLOSE_S)
            assert not thread.is_alive(), f"{thread.name} has not ended within {_CLOSE_S} s"

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:
                return  # closed
            thread = threading.Thread(target=self._serve, args=(connection,), name=f"pages to {address}", daemon=True)
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        """Until the other side has gone; what is wrong with a request is told to who asked."""
        with connection, contextlib.suppress(OSError):
            _tune(connection)
            while True:
                header = bytearray(_REQUEST.size)
                _fill(connection, memoryview(header))
                magic, number, num_runs = _REQUEST.unpack(header)
                if magic != MAGIC or num_runs > MAX_RUNS:
                    break
                runs = bytearray(num_runs * _RUN.size)
                _fill(connection, memoryview(runs))
                for index, (first, num_pages) in enumerate(_RUN.iter_unpack(runs)):
                    self._send_run(connection, number, index, first, num_pages)
        with self._lock:
            self._connections.pop(connection, None)

    def _send_run(self, connection: socket.socket, number: int, index: int, first: int, num_pages: int) -> None:
        try:
            views = self._memory.views(first, num_pages)
        except ValueError as error:
            text = str(error).encode()
            connection.sendall(_ANSWER.pack(MAGIC, number, index, 1, len(text)) + text)
            return
        length = num_pages * self._memory.page_bytes
        _send_all(connection, [memoryview(_ANSWER.pack(MAGIC, number, index, 0, length)), *views])


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _send_all(connection: socket.socket, views: list[memoryview]) -> None:
    """All of the views in as few calls as there can be: each costs a wait for Python's lock, which a forward may hold."""
    while views:
        views = _rest(views, connection.sendmsg(views[:MAX_VIEWS]))


def _fill_all(connection: socket.socket, views: list[memoryview]) -> None:
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


def _fill(connection: socket.socket, view: memoryview) -> None:
    """Receive exactly as many bytes as the view has, into it. Raises WireError when the connection ends before."""
    received = 0
    while received < len(view):
        count = connection.recv_into(view[received:], 0, socket.MSG_WAITALL)
        if count == 0:
            raise WireError(f"the connection ended when {received} of {len(view)} bytes of a piece had come")
        received += count
