"""The mooncake transport: Mooncake's transfer engine, over TCP or RDMA, from CPU or GPU memory.

An adapter on the package `mooncake-transfer-engine` (or its `-non-cuda` variant; both need the system's RDMA libraries, even for
TCP: libibverbs1 librdmacm1 libnl-3-200 libnl-route-3-200). Engines find each other without a metadata server ("P2PHANDSHAKE").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from moesaic.launch.disaggregation.layout import PageRun
from moesaic.launch.disaggregation.memory import PagedMemory, RemoteMemory, run_pieces

MAX_READS_AT_ONCE = 4


class _Description(msgspec.Struct, frozen=True):
    """A peer's engine (host:port), and where its layers are."""

    engine: str
    memory: RemoteMemory


_decoder: msgspec.msgpack.Decoder[_Description] = msgspec.msgpack.Decoder(_Description)


class MooncakeRead:
    """See transfer.Read."""

    def __init__(self, peer: str, future: Future[int]) -> None:
        self._peer = peer
        self._future = future

    @property
    def ended(self) -> bool:
        return self._future.done()

    @property
    def error(self) -> str | None:
        if not self._future.done():
            return None
        if self._future.cancelled():
            return "given up before it began"
        if self._future.exception() is not None:
            return f"mooncake could not read from {self._peer}: {self._future.exception()}"
        code = self._future.result()
        return None if code == 0 else f"mooncake could not read from {self._peer} (code {code})"

    def cancel(self) -> None:
        self._future.cancel()


class MooncakeBackend:
    """See transfer.Backend. `device`: network devices for RDMA, separated by commas; empty: TCP."""

    name = "mooncake"
    needs_progress = False

    def __init__(self, memory: PagedMemory, host: str = "127.0.0.1", device: str = "") -> None:
        """Registers the memory. Raises ImportError without the package or its libraries, RuntimeError when the engine refuses."""
        from mooncake.engine import TransferEngine

        self._memory = memory
        self._engine = TransferEngine()
        _require(self._engine.initialize(host, "P2PHANDSHAKE", "rdma" if device else "tcp", device), "initialize")
        for address in memory.addresses:
            _require(self._engine.register_memory(address, memory.layer_bytes), "register memory")
        self._name = f"{host}:{self._engine.get_rpc_port()}"
        self._peers: dict[str, _Description] = {}
        self._changed: Callable[[], None] = lambda: None
        # The engine's blocking calls say in their code whether all has arrived; each takes a thread while it lasts.
        self._readers = ThreadPoolExecutor(MAX_READS_AT_ONCE, thread_name_prefix="reads over mooncake")

    def start(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    def progress(self) -> None:
        """Not needed: the engine has threads."""

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(_Description(self._name, RemoteMemory.of(self._memory)))

    def connect(self, peer: str, description: bytes) -> None:
        try:
            remote = _decoder.decode(description)
        except msgspec.MsgspecError as error:
            raise ValueError(
                f"{peer} does not serve pages over mooncake: use one transfer backend on both sides ({error})"
            ) from error
        remote.memory.check_like(self._memory, peer)
        self._peers[peer] = remote

    def read(self, peer: str, runs: Sequence[PageRun]) -> MooncakeRead:
        future = self._readers.submit(self._read, self._peers[peer], runs)
        future.add_done_callback(lambda _: self._changed())
        return MooncakeRead(peer, future)

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)
        for address in self._memory.addresses:
            self._engine.unregister_memory(address)
        del self._engine  # its end takes a while: here, and not in whatever thread the garbage collector runs

    def _read(self, remote: _Description, runs: Sequence[PageRun]) -> int:
        pieces = run_pieces(self._memory, remote.memory, runs)
        own, others, lengths = pieces.T.tolist()
        code: int = self._engine.batch_transfer_sync_read(remote.engine, own, others, lengths)
        return code


def _require(code: int, operation: str) -> None:
    if code != 0:
        raise RuntimeError(f"mooncake's transfer engine could not {operation} (code {code})")
