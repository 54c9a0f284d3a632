"""A network in memory for the ranks of a rebalance; its `Seam` sees every message and fails, kills, corrupts or loses one."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from moesaic.eplb.transfer import Exchange, Message, TransferError

Action = Literal["fail", "kill", "corrupt", "lose"]


class Killed(BaseException):
    """The rank is dead: nothing of it runs after this."""


@dataclass
class Seam:
    """Counts the events of all ranks by kind; the one numbered `at` of kind `kind` meets with `action`."""

    kind: str = ""
    at: int = -1
    action: Action = "fail"
    seen: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def passes(self, kind: str) -> Action | None:
        """Raises for "fail" and "kill", returns the others."""
        index = self.seen[kind]
        self.seen[kind] += 1
        if kind != self.kind or index != self.at:
            return None
        if self.action == "fail":
            raise TransferError(f"injected at {kind} {index}")
        if self.action == "kill":
            raise Killed
        return self.action


class MemoryExchange:
    def __init__(self, num_messages: int, ended: Callable[[], None]) -> None:
        self.open = num_messages
        self._ended = ended

    def done(self) -> bool:
        if not self.open:
            self._ended()
        return not self.open


class MemoryNetwork:
    """Messages match by sender, receiver and tag, in order; the bytes travel once both sides have posted, as with gloo."""

    def __init__(self, world_size: int, seam: Seam) -> None:
        self.world_size = world_size
        self.seam = seam
        self._sends: dict[tuple[int, int, int], deque[tuple[Tensor, MemoryExchange]]] = defaultdict(deque)
        self._receives: dict[tuple[int, int, int], deque[tuple[Tensor, MemoryExchange]]] = defaultdict(deque)

    def wire(self, rank: int) -> MemoryWire:
        return MemoryWire(self, rank)

    def post(self, rank: int, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Exchange:
        action = self.seam.passes("post")
        exchange = MemoryExchange(len(sends) + len(receives), self._passes_end)
        if action == "lose":
            return exchange
        for peer, tensor in sends:
            data = tensor
            if action == "corrupt":
                data = tensor.clone()
                data.view(-1)[0] += 1
                action = None
            self._sends[rank, peer, tag].append((data, exchange))
            self._match((rank, peer, tag))
        for peer, tensor in receives:
            self._receives[peer, rank, tag].append((tensor, exchange))
            self._match((peer, rank, tag))
        return exchange

    def _passes_end(self) -> None:
        self.seam.passes("end")

    def _match(self, key: tuple[int, int, int]) -> None:
        while self._sends[key] and self._receives[key]:
            (data, sent), (target, received) = self._sends[key].popleft(), self._receives[key].popleft()
            assert data.shape == target.shape, f"{key}: {data.shape} sent, {target.shape} expected"
            target.copy_(data)
            sent.open -= 1
            received.open -= 1


class MemoryWire:
    """One rank's end of a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork, rank: int) -> None:
        self._network = network
        self.rank = rank
        self.world_size = network.world_size

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Exchange:
        return self._network.post(self.rank, sends, receives, tag)
