"""The decode end of the tcp transport: one connection and one thread per prefill rank, and its reads in turn.

Knows no rooms. A run that comes twice, out of turn, too short or too long is noticed, and ends the connection and all its reads, as
does one that stands still. A reader whose connection has ended is of no more use: its owner makes another.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence

from moesaic.launch.disaggregation.layout import PageRun
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.tcp_wire import ANSWER, CLOSE_S, MAGIC, REQUEST, RUN, WireError, fill, fill_all, tune

CONNECT_S = 3.0


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


class TcpReader:
    """One prefill rank's pages: reads go in, their pages come back in the same order. `changed()` is called when one has ended."""

    def __init__(
        self, name: str, address: tuple[str, int], memory: PagedMemory, changed: Callable[[], None], stalled_s: float
    ) -> None:
        self.address = address
        self._name = name
        self._stalled_s = stalled_s
        self._memory = memory
        self._changed = changed
        self._waiting: queue.SimpleQueue[TcpRead | None] = queue.SimpleQueue()
        self._requested: deque[TcpRead] = deque()
        self._lock = threading.Lock()
        self._stopped = False
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name=f"reads from {name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def over(self) -> bool:
        """Whether its connection has ended: every read fails."""
        with self._lock:
            return self._stopped

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
        self._thread.join(CLOSE_S)
        assert not self._thread.is_alive(), f"reads from {self._name} have not ended within {CLOSE_S} s"

    def _run(self) -> None:
        reason = "the connection was closed"
        try:
            with socket.create_connection(self.address, CONNECT_S) as connection:
                tune(connection, self._stalled_s, socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)
                with self._lock:
                    self._socket = connection
                    stopped = self._stopped
                while not stopped and self._request(connection):
                    self._receive(connection, self._requested[0])
                    self._end(self._requested.popleft(), None)
        except BlockingIOError:
            reason = f"the connection stood still for {self._stalled_s:g} s"
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
            runs = b"".join(RUN.pack(run.source, run.num_pages) for run in read.runs)
            self._requested.append(read)  # before it is sent: sending may fail, and every read must end
            connection.sendall(REQUEST.pack(MAGIC, read.number, len(read.runs)) + runs)
        return True

    def _receive(self, connection: socket.socket, read: TcpRead) -> None:
        for index, run in enumerate(read.runs):
            header = bytearray(ANSWER.size)
            fill(connection, memoryview(header))
            magic, number, run_index, status, length = ANSWER.unpack(header)
            if (magic, number, run_index) != (MAGIC, read.number, index):
                raise WireError(f"run {run_index} of read {number} came, expected run {index} of read {read.number}")
            if status:
                text = bytearray(min(length, 1000))
                fill(connection, memoryview(text))
                raise WireError(text.decode(errors="replace"))
            if length != run.num_pages * self._memory.page_bytes:
                raise WireError(f"a run of {run.num_pages} pages has {length} bytes, not {run.num_pages * self._memory.page_bytes}")
            fill_all(connection, self._memory.views(run.target, run.num_pages))

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
