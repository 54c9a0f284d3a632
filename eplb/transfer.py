"""Messages between GPUs that nobody waits for: post, ask whether done, and give up without harm. And a sum built of them.

The only file of eplb that knows torch.distributed. A *wire* is one GPU's end: it numbers the GPUs as expert ranks. Tags are fresh
per cycle, layer and round, so a message of an abandoned cycle can never be taken for one of a later cycle; what may still write
into memory is *quarantined*: kept alive and counted until it has ended.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.eplb.location import Int64Array

_FOREVER = timedelta(days=365)
_LAYER_BITS, _ROUND_BITS, _CYCLE_BITS = 8, 12, 11
SUM_LAYER = (1 << _LAYER_BITS) - 1

Message = tuple[int, Tensor]
"""The other GPU, and a contiguous tensor to send or to fill."""


class TransferError(RuntimeError):
    """A message that could not be posted, delivered or believed."""


def fresh_tag(cycle: int, layer: int, round_index: int) -> int:
    """A tag below 2^31, used again after 2048 cycles. Raises ValueError when layer or round doesn't fit."""
    if not 0 <= layer < 1 << _LAYER_BITS or not 0 <= round_index < 1 << _ROUND_BITS:
        most = f"{SUM_LAYER} layers of {1 << _ROUND_BITS} rounds"
        raise ValueError(f"layer {layer}, round {round_index}: at most {most} can be moved")
    return ((cycle % (1 << _CYCLE_BITS)) << _LAYER_BITS | layer) << _ROUND_BITS | round_index


class Exchange(Protocol):
    """Messages under way."""

    def done(self) -> bool:
        """Whether all of them have been sent and received; doesn't block. Raises TransferError once they have failed."""
        ...


class Wire(Protocol):
    """One GPU's end. `rank` of `world_size`."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Exchange:
        """Start messages to and from one GPU, in the same order on both sides; doesn't block. Raises TransferError."""
        ...


class ProcessGroupWire:
    """Over a process group of the expert ranks, best one of its own: a lost message can then harm nothing else.

    With NCCL, all ranks must have run one collective on the group before. NCCL has no tags: there a cycle that is abandoned with
    messages quarantined needs a new group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._waiters = _Waiters()
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._answers = "nccl" in dist.get_backend(group)

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Exchange:
        """See Wire. The tensors are kept alive until the exchange has ended."""
        posts = [(dist.isend, message) for message in sends] + [(dist.irecv, message) for message in receives]
        operations = [dist.P2POp(call, tensor, group=self._group, tag=tag, group_peer=peer) for call, (peer, tensor) in posts]
        tensors = [tensor for _, tensor in (*sends, *receives)]
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise TransferError(f"messages to GPU {posts[0][1][0]} could not be posted: {error}") from error
        if self._answers and tensors[0].is_cuda:
            return _DeviceExchange(works, tensors)
        exchange = _WaitedExchange(works, tensors)
        self._waiters.wait_for(exchange)
        return exchange


class _WaitedExchange:
    """gloo's messages (of any device) complete only for who waits (`is_completed` stays False), so another thread does that."""

    def __init__(self, works: Sequence[dist.Work], tensors: Sequence[Tensor]) -> None:
        self._works = works
        self._tensors = tensors
        self._error: RuntimeError | None = None
        self._ended = threading.Event()

    def wait(self) -> None:
        for work in self._works:
            try:
                work.wait(_FOREVER)  # a time-out would close gloo's connections
            except RuntimeError as error:
                self._error = error
        self._ended.set()

    def done(self) -> bool:
        if self._ended.is_set() and self._error is not None:
            raise TransferError(f"a message failed: {self._error}")
        return self._ended.is_set()


class _Waiters:
    """Threads that wait, one per exchange under way; made when none is idle, so one that waits in vain holds up no other."""

    def __init__(self) -> None:
        self._idle: deque[SimpleQueue[_WaitedExchange]] = deque()

    def wait_for(self, exchange: _WaitedExchange) -> None:
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            threading.Thread(target=self._run, args=(inbox,), name="eplb-messages", daemon=True).start()
        inbox.put(exchange)

    def _run(self, inbox: SimpleQueue[_WaitedExchange]) -> None:
        while True:
            inbox.get().wait()
            self._idle.append(inbox)


class _DeviceExchange:
    """NCCL's messages, which answer without a wait."""

    def __init__(self, works: Sequence[dist.Work], tensors: Sequence[Tensor]) -> None:
        self._works = works
        self._tensors = tensors

    def done(self) -> bool:
        try:
            if not all(work.is_completed() for work in self._works):
                return False
            for work in self._works:
                work.wait()  # orders the current stream behind the messages
        except RuntimeError as error:
            raise TransferError(f"a message failed: {error}") from error
        return True


class Quarantine:
    """Exchanges that their cycle gave up while they were under way."""

    def __init__(self) -> None:
        self._exchanges: list[Exchange] = []

    def add(self, exchange: Exchange) -> None:
        self._exchanges.append(exchange)

    def count(self) -> int:
        """How many are still under way; those that have ended are let go."""
        self._exchanges = [exchange for exchange in self._exchanges if not has_ended(exchange)]
        return len(self._exchanges)


def has_ended(exchange: Exchange) -> bool:
    """Done, or failed: nothing writes into its memory any more."""
    try:
        return exchange.done()
    except TransferError:
        return True


class PendingSum(Protocol):
    """A sum over all GPUs under way."""

    def done(self) -> bool:
        """Get on with it, without blocking, and say whether it is complete. Raises TransferError; may be called again then."""
        ...

    def result(self) -> Int64Array:
        """The sum, once done."""
        ...

    def abandon(self) -> None:
        """Give it up."""
        ...

    @property
    def waiting_for(self) -> int | None:
        """A GPU whose messages it waits for."""
        ...


class TreeSum:
    """Sum of int64 arrays over all GPUs, up and down a binary tree: each GPU sends its array at most three times."""

    def __init__(self, wire: Wire, quarantine: Quarantine, array: Int64Array, cycle: int) -> None:
        self._wire, self._quarantine = wire, quarantine
        self._tag = fresh_tag(cycle, SUM_LAYER, 0)
        self._total = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64).copy())
        self._children = [child for child in (2 * wire.rank + 1, 2 * wire.rank + 2) if child < wire.world_size]
        self._parent = (wire.rank - 1) // 2 if wire.rank else None
        self._parts = {child: torch.empty_like(self._total) for child in self._children}
        self._under_way: dict[tuple[str, int], Exchange] = {}
        self._added = self._complete = False

    def done(self) -> bool:
        """See PendingSum."""
        if not self._complete:
            self._complete = self._collected() and self._answered() and self._passed_on()
        return self._complete

    def result(self) -> Int64Array:
        """See PendingSum."""
        assert self._complete, "the sum is not complete"
        total: Int64Array = self._total.numpy()
        return total

    def abandon(self) -> None:
        """See PendingSum."""
        for exchange in self._under_way.values():
            self._quarantine.add(exchange)

    @property
    def waiting_for(self) -> int | None:
        """See PendingSum."""
        return next((peer for (_, peer), exchange in self._under_way.items() if not has_ended(exchange)), None)

    def _collected(self) -> bool:
        arrived = [self._arrived("collect", child, receive=part) for child, part in self._parts.items()]
        if not all(arrived):
            return False
        if not self._added:
            for part in self._parts.values():
                self._total += part
            self._added = True
        return True

    def _answered(self) -> bool:
        if self._parent is None:
            return True
        if ("answer", self._parent) not in self._under_way:
            answer = torch.empty_like(self._total)
            exchange = self._wire.post([(self._parent, self._total)], [(self._parent, answer)], self._tag)
            self._under_way["answer", self._parent] = exchange
            self._total = answer
        return self._under_way["answer", self._parent].done()

    def _passed_on(self) -> bool:
        arrived = [self._arrived("pass on", child, send=self._total) for child in self._children]
        return all(arrived)

    def _arrived(self, step: str, peer: int, *, send: Tensor | None = None, receive: Tensor | None = None) -> bool:
        if (step, peer) not in self._under_way:
            sends = [(peer, send)] if send is not None else []
            receives = [(peer, receive)] if receive is not None else []
            self._under_way[step, peer] = self._wire.post(sends, receives, self._tag)
        return self._under_way[step, peer].done()
