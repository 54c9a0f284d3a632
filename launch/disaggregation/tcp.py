"""The transport that needs nothing: pages over TCP, from one process's KV memory into another's, without a copy in between.

A prefill rank serves its pages (`tcp_serve.py`); a decode rank has a connection to each prefill rank that it reads from
(`tcp_read.py`). CPU memory only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moesaic.launch.disaggregation.layout import PageRun
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.tcp_read import TcpRead, TcpReader
from moesaic.launch.disaggregation.tcp_serve import PageServer
from moesaic.launch.disaggregation.tcp_wire import STALLED_S


class TcpBackend:
    """See transfer.Backend. Serves on `host`, at a free port, once it has been asked to describe itself."""

    name = "tcp"
    needs_progress = False

    def __init__(self, memory: PagedMemory, host: str = "127.0.0.1", stalled_s: float = STALLED_S) -> None:
        """`stalled_s`: see tcp_wire. Raises ValueError for GPU memory."""
        if memory.device_index is not None:
            raise ValueError("the tcp transport moves CPU memory only; use --disaggregation-transfer-backend nixl or mooncake")
        self._memory = memory
        self._host = host
        self._stalled_s = stalled_s
        self._changed: Callable[[], None] = lambda: None
        self._server: PageServer | None = None
        self._peers: dict[str, TcpReader] = {}
        self._leaving: list[TcpReader] = []
        self._num_reads = 0

    def start(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    def progress(self) -> None:
        """Not needed: there are threads."""

    def describe(self) -> bytes:
        if self._server is None:
            self._server = PageServer(self._memory, self._host, self._stalled_s)
        host, port = self._server.address
        return f"{host}:{port}".encode()

    def connect(self, peer: str, description: bytes) -> None:
        host, _, port = description.decode(errors="replace").rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(
                f"{peer} does not serve pages over tcp ({description[:100]!r}): use one transfer backend on both sides"
            )
        self._peers[peer] = self._reader(peer, (host, int(port)))

    def read(self, peer: str, runs: Sequence[PageRun]) -> TcpRead:
        read = TcpRead(self._num_reads, runs)
        self._num_reads += 1
        reader = self._peers[peer]
        if reader.over:  # and the peer lives, or it would have been disconnected: one broken connection is not its end
            self._leave(reader)
            reader = self._peers[peer] = self._reader(peer, reader.address)
        reader.submit(read)
        return read

    def disconnect(self, peer: str) -> None:
        gone = self._peers.pop(peer, None)
        if gone is not None:
            self._leave(gone)

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        for gone in self._leaving:
            gone.join()
        if self._server is not None:
            self._server.close()

    def _reader(self, peer: str, address: tuple[str, int]) -> TcpReader:
        return TcpReader(peer, address, self._memory, self._changed, self._stalled_s)

    def _leave(self, reader: TcpReader) -> None:
        reader.stop()
        self._leaving = [*(other for other in self._leaving if other.alive), reader]
