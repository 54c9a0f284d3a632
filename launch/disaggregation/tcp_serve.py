"""The prefill end of the tcp transport: it serves runs of this rank's pages to whoever connects, one thread per connection.

Knows no rooms and no readers: who asks for a page that is there gets it; who doesn't take what it asked for is left.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.tcp_wire import ANSWER, CLOSE_S, MAGIC, MAX_RUNS, REQUEST, RUN, fill, send_all, tune

RETRY_S = 0.1


class PageServer:
    """Serves runs of pages; one thread per connection."""

    def __init__(self, memory: PagedMemory, host: str, stalled_s: float) -> None:
        self._memory = memory
        self._listener = socket.create_server((host, 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._stalled_s = stalled_s
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
            thread.join(CLOSE_S)
            assert not thread.is_alive(), f"{thread.name} has not ended within {CLOSE_S} s"

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(RETRY_S)  # out of file descriptors, for one: it waits to be accepted
                continue
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
            tune(connection, self._stalled_s, socket.SO_SNDTIMEO)  # the next request may be a long time coming
            while True:
                header = bytearray(REQUEST.size)
                fill(connection, memoryview(header))
                magic, number, num_runs = REQUEST.unpack(header)
                if magic != MAGIC or num_runs > MAX_RUNS:
                    break
                runs = bytearray(num_runs * RUN.size)
                fill(connection, memoryview(runs))
                for index, (first, num_pages) in enumerate(RUN.iter_unpack(runs)):
                    self._send_run(connection, number, index, first, num_pages)
        with self._lock:
            self._connections.pop(connection, None)

    def _send_run(self, connection: socket.socket, number: int, index: int, first: int, num_pages: int) -> None:
        try:
            views = self._memory.views(first, num_pages)
        except ValueError as error:
            text = str(error).encode()
            connection.sendall(ANSWER.pack(MAGIC, number, index, 1, len(text)) + text)
            return
        length = num_pages * self._memory.page_bytes
        send_all(connection, [memoryview(ANSWER.pack(MAGIC, number, index, 0, length)), *views])
