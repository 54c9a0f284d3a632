"""The nixl transport: NVIDIA's NIXL over UCX, from CPU or GPU memory (RDMA, NVLink, shared memory: whatever UCX finds).

An adapter on the package `nixl` (with `nixl-cu12` or `nixl-cu13`). Pages are read one-sided, without the other side's doing.
The agent is used by one thread only, the transfer thread. A connection that breaks while the peer lives is made anew.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from moesaic.launch.disaggregation.layout import PageRun
from moesaic.launch.disaggregation.memory import PagedMemory, RemoteMemory, run_pieces
from moesaic.launch.disaggregation.transfer import Read

Uint64Array = npt.NDArray[np.uint64]

PAUSES_S = (0.05, 0.3)
"""Before a read that has failed begins anew, each time. At once is too soon: UCX closes the old connection behind our back, and the
peer may take the end of the old one for that of the new one (github.com/ai-dynamo/nixl/issues/2109)."""


class _Description(msgspec.Struct, frozen=True):
    """A peer's agent, and where its layers are."""

    agent: bytes
    memory: RemoteMemory


_decoder: msgspec.msgpack.Decoder[_Description] = msgspec.msgpack.Decoder(_Description)


class _Connection:
    """To a peer's agent. Given up when a read over it fails, and made anew by the next one that begins, until it is closed."""

    def __init__(self, agent: Any, description: _Description) -> None:
        self.memory = description.memory
        self._agent, self._metadata = agent, description.agent
        self.name: str = agent.add_remote_agent(self._metadata)
        self.number = 0
        """How often it was made anew."""
        self.closed = False
        self._up = True

    def begin(self, local: Any, others: Any) -> Any:
        """Begin to read `others` into `local`; nixl's handle of it. Raises what nixl raises."""
        assert not self.closed, f"the connection to {self.name} is closed"
        if not self._up:
            self._agent.add_remote_agent(self._metadata)
            self._up, self.number = True, self.number + 1
        handle = self._agent.initialize_xfer("READ", local, others, self.name)
        self._agent.transfer(handle)
        return handle

    def give_up(self, number: int) -> None:
        """A read over the connection of this `number` has failed. It may have been made anew since."""
        if self._up and number == self.number:
            self._up = False
            with contextlib.suppress(Exception):  # nixl forgets an agent whose connection has ended, and then knows none to remove
                self._agent.remove_remote_agent(self.name)

    def close(self) -> None:
        """For good."""
        self.closed = True
        self.give_up(self.number)


class NixlRead:
    """See transfer.Read. nixl can't call back a transfer that has begun: it is waited for.

    One that fails begins anew, over a new connection and from its first page on; UCX has ended what was under way over the old one.
    """

    def __init__(self, agent: Any, peer: str, connection: _Connection, descriptors: tuple[Any, Any]) -> None:
        """`descriptors`: nixl's lists of own pieces of memory and of the peer's."""
        self._agent, self._peer, self._connection = agent, peer, connection
        self._descriptors = descriptors
        self._pauses = list(PAUSES_S)
        self._begin_at = 0.0
        self._number = 0
        self._handle: Any = None
        self._over = self._unwanted = False
        self.error: str | None = None
        self._begin()

    @property
    def ended(self) -> bool:
        if not self._over and self._handle is not None:
            self._check()
        elif not self._over and (self._hopeless or time.monotonic() >= self._begin_at):
            self._begin()
        return self._over

    def cancel(self) -> None:
        """It does not begin again. What has begun goes on: `ended` says when the pages are quiet."""
        self._unwanted = True

    @property
    def _hopeless(self) -> bool:
        return self._unwanted or self._connection.closed

    def _begin(self) -> None:
        if self._hopeless:
            self._over, self.error = True, self.error or f"{self._peer}: given up before it began"
            return
        try:
            self._handle = self._connection.begin(*self._descriptors)
        except Exception as error:  # nixl raises its own classes, which share no base with a name
            self._number = self._connection.number
            self._fail(repr(error))
        else:
            self._number = self._connection.number

    def _check(self) -> None:
        problem = "the transfer failed"
        try:
            state = self._agent.check_xfer_state(self._handle)
        except Exception as error:  # as above
            state, problem = "ERR", repr(error)
        if state == "PROC":
            return
        self._agent.release_xfer_handle(self._handle)
        self._handle = None
        if state == "ERR":
            self._fail(problem)
        else:
            self._over, self.error = True, None

    def _fail(self, why: str) -> None:
        """Once more, in a moment, unless it has been tried often enough."""
        self._connection.give_up(self._number)
        tried, most = len(PAUSES_S) - len(self._pauses) + 1, len(PAUSES_S) + 1
        self.error = f"nixl could not read from {self._peer} ({tried} of {most} attempts, each over a new connection): {why}"
        self._over = self._hopeless or not self._pauses
        if not self._over:
            self._begin_at = time.monotonic() + self._pauses.pop(0)


class RefusedRead:
    """See transfer.Read: one that does not begin."""

    ended = True

    def __init__(self, error: str) -> None:
        self.error: str | None = error

    def cancel(self) -> None:
        """It is over."""


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
        self._peers: dict[str, _Connection] = {}

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
        self._peers[peer] = _Connection(self._agent, remote)

    def read(self, peer: str, runs: Sequence[PageRun]) -> Read:
        connection = self._peers[peer]
        remote = connection.memory
        try:
            pieces = run_pieces(self._memory, remote, runs)
        except ValueError as error:
            return RefusedRead(f"nixl can't read from {peer}: {error}")
        local = self._agent.get_xfer_descs(_descriptors(pieces[:, 0], pieces[:, 2], self._device), self._kind)
        others = self._agent.get_xfer_descs(_descriptors(pieces[:, 1], pieces[:, 2], remote.device), remote.kind)
        return NixlRead(self._agent, peer, connection, (local, others))

    def disconnect(self, peer: str) -> None:
        gone = self._peers.pop(peer, None)
        if gone is not None:
            gone.close()

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        self._agent.deregister_memory(self._registered)


def _descriptors(addresses: Uint64Array, lengths: Uint64Array, device: int) -> Uint64Array:
    """uint64 [n], [n] -> nixl's rows (address, length, device) [n, 3]."""
    return np.stack([addresses, lengths, np.full_like(addresses, device)], axis=1)
