"""The nixl transport: NVIDIA's NIXL over UCX, from CPU or GPU memory (RDMA, NVLink, shared memory: whatever UCX finds).

An adapter on the package `nixl` (with `nixl-cu12` or `nixl-cu13`). Pages are read one-sided, without the other side's doing.
The agent is used by one thread only, the transfer thread.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from moesaic.launch.disaggregation.layout import PageRun
from moesaic.launch.disaggregation.memory import PagedMemory, RemoteMemory, run_pieces

Uint64Array = npt.NDArray[np.uint64]


class _Description(msgspec.Struct, frozen=True):
    """A peer's agent, and where its layers are."""

    agent: bytes
    memory: RemoteMemory


_decoder: msgspec.msgpack.Decoder[_Description] = msgspec.msgpack.Decoder(_Description)


class NixlRead:
    """See transfer.Read. nixl can't call back a transfer that has begun: it is waited for."""

    def __init__(self, agent: Any, handle: Any, error: str | None = None) -> None:
        self._agent = agent
        self._handle = handle
        self.error = error

    @property
    def ended(self) -> bool:
        if self._handle is None:
            return True
        try:
            state = self._agent.check_xfer_state(self._handle)
        except Exception as error:  # nixl raises its own classes, which share no base with a name
            state, self.error = "ERR", f"nixl: {error!r}"
        if state == "PROC":
            return False
        if state == "ERR":
            self.error = self.error or "nixl reports that the transfer failed"
        self._agent.release_xfer_handle(self._handle)
        self._handle = None
        return True

    def cancel(self) -> None:
        """Nothing to do: `ended` says when the pages are quiet."""


class NixlBackend:
    """See transfer.Backend."""

    name = "nixl"
    needs_progress = True

    def __init__(self, memory: PagedMemory) -> None:
        """Registers the memory. Raises ImportError without the package."""
        from nixl._api import nixl_agent, nixl_agent_config

        self._memory = memory
        self._kind = "DRAM" if memory.device_index is None else "VRAM"
        self._device = memory.device_index or 0
        # nixl's own progress thread would take a whole core, all the time.
        self._agent = nixl_agent(uuid.uuid4().hex, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        regions = [(address, memory.layer_bytes, self._device, "") for address in memory.addresses]
        self._registered = self._agent.register_memory(regions, self._kind)
        self._peers: dict[str, tuple[str, RemoteMemory]] = {}

    def start(self, changed: Callable[[], None]) -> None:
        """nixl calls nobody back."""

    def progress(self) -> None:
        # Nobody sends notifications here; asking for them is how UCX gets to work on connections and reads.
        self._agent.get_new_notifs()

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(_Description(self._agent.get_agent_metadata(), RemoteMemory.of(self._memory)))

    def connect(self, peer: str, description: bytes) -> None:
        try:
            remote = _decoder.decode(description)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{peer} does not serve pages over nixl: use one transfer backend on both sides ({error})") from error
        remote.memory.check_like(self._memory, peer)
        self._peers[peer] = (self._agent.add_remote_agent(remote.agent), remote.memory)

    def read(self, peer: str, runs: Sequence[PageRun]) -> NixlRead:
        agent_name, remote = self._peers[peer]
        try:
            pieces = run_pieces(self._memory, remote, runs)
            local = self._agent.get_xfer_descs(_descriptors(pieces[:, 0], pieces[:, 2], self._device), self._kind)
            others = self._agent.get_xfer_descs(_descriptors(pieces[:, 1], pieces[:, 2], remote.device), remote.kind)
            handle = self._agent.initialize_xfer("READ", local, others, agent_name)
            self._agent.transfer(handle)
        except Exception as error:  # as above
            return NixlRead(self._agent, None, f"nixl could not begin to read from {peer}: {error!r}")
        return NixlRead(self._agent, handle)

    def disconnect(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if known is not None and all(name != known[0] for name, _ in self._peers.values()):
            self._agent.remove_remote_agent(known[0])

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        self._agent.deregister_memory(self._registered)


def _descriptors(addresses: Uint64Array, lengths: Uint64Array, device: int) -> Uint64Array:
    """uint64 [n], [n] -> nixl's rows (address, length, device) [n, 3]."""
    return np.stack([addresses, lengths, np.full_like(addresses, device)], axis=1)
