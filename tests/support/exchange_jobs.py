"""A counted exchange between two ranks, over a transport that lets counts arrive when it is told to."""

from __future__ import annotations

import threading
import time
from typing import Any

import rank_pool
import torch
from emulated_network import Delayed
from torch import Tensor

from moesaic.moe.communication import Communications, Pending
from moesaic.moe.counted_exchange import CountedExchange, CountedRows

RANKS = (0, 1)
DEADLINE_S = 10.0


class HeldCounts:
    """A `CommunicationWatcher`: counts arrive when `let_in` says so; of rows it notes how many bytes left, from which thread."""

    def __init__(self) -> None:
        self.held: list[Delayed] = []
        self.left: list[int] = []
        self.threads: list[int] = []

    def posted(self, name: str, pending: Pending, num_bytes: int) -> Pending:
        if name == "dispatch counts":
            self.held.append(Delayed(pending))
            return self.held[-1]
        self.left.append(num_bytes)
        self.threads.append(threading.get_ident())
        return pending

    def let_in(self, number: int) -> None:
        """The counts of the exchange begun as number `number`, once they are really here."""
        delayed = self.held[number]
        delayed._pending.wait()
        delayed.complete()


class Exchanges:
    """One rank's side. Exchange number n sends n + 1 rows of 4 bytes to rank 0 and n + 2 to rank 1, each byte sender * 16 + n."""

    def __init__(self, rank: int, transport: Any) -> None:
        communications = Communications()
        communications.transport = transport
        self._rank = rank
        self._exchange = CountedExchange(
            size=2,
            counts_group=rank_pool.group_of(RANKS),
            rows_group=rank_pool.group_of(RANKS, "rows"),
            communications=communications,
        )

    def start(self, number: int, *, ahead: bool = True) -> CountedRows:
        counts = torch.tensor([[number + 1], [number + 2]])
        rows = torch.full((2 * number + 3, 4), self._rank * 16 + number, dtype=torch.uint8)
        return self._exchange.start(rows, counts, ahead=ahead, most_rows=40)

    def expected(self, number: int) -> Tensor:
        """What this rank must receive."""
        count = number + 1 + self._rank
        return torch.cat([torch.full((count, 4), sender * 16 + number, dtype=torch.uint8) for sender in RANKS])

    def check(self, number: int, exchange: CountedRows) -> None:
        exchange.wait()
        assert torch.equal(exchange.received, self.expected(number))
        assert exchange.counts == [[number + 1 + self._rank]] * 2


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"this has not come true within {DEADLINE_S} s"
        time.sleep(0.001)


def ahead_job(rank: int) -> None:
    """Rows leave by themselves when their counts are here, not before, and tell it when they have arrived."""
    transport = HeldCounts()
    exchanges = Exchanges(rank, transport)
    exchange, told = exchanges.start(0), threading.Event()
    exchange.when_done(told.set)
    assert not transport.left and not told.is_set()
    transport.let_in(0)
    wait_for(told.is_set)
    assert transport.left == [3 * 4]
    exchanges.check(0, exchange)
    late = threading.Event()
    exchange.when_done(late.set)
    wait_for(late.is_set)


def reordered_job(rank: int) -> None:
    """Counts of three exchanges arrive in another order on each rank; rows leave in the order in which they were begun."""
    transport = HeldCounts()
    exchanges = Exchanges(rank, transport)
    begun = [exchanges.start(number) for number in range(3)]
    for number in ((2, 1), (1, 2))[rank]:
        transport.let_in(number)
        assert not transport.left, "rows left before those of an exchange begun earlier"
    transport.let_in(0)
    wait_for(lambda: len(transport.left) == 3)
    assert transport.left == [12, 20, 28]
    for number in (2, 0, 1):
        exchanges.check(number, begun[number])


def waited_job(rank: int) -> None:
    """Whoever waits for an exchange sends the rows of all before it, in his own thread, where nothing is sent ahead."""
    transport = HeldCounts()
    exchanges = Exchanges(rank, transport)
    begun = [exchanges.start(number, ahead=False) for number in range(3)]
    for number in range(3):
        transport.let_in(number)
    time.sleep(0.02)
    assert not transport.left
    exchanges.check(1, begun[1])
    assert transport.left == [12, 20]
    exchanges.check(2, begun[2])
    exchanges.check(0, begun[0])
    assert set(transport.threads) == {threading.get_ident()}


def raced_job(rank: int, rounds: int) -> None:
    """Sent ahead and waited for at the same time, many times."""
    exchanges = Exchanges(rank, None)
    for number in range(rounds):
        one, other = exchanges.start(number % 7), exchanges.start(number % 5, ahead=number % 3 > 0)
        for exchange, kind in ((other, number % 5), (one, number % 7)) if number % 2 else ((one, number % 7), (other, number % 5)):
            exchanges.check(kind, exchange)


class LosesCounts:
    """A transport on which counts never arrive."""

    def posted(self, name: str, pending: Pending, num_bytes: int) -> Any:
        return _Lost(pending) if name == "dispatch counts" else pending


class _Lost:
    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    def wait(self) -> None:
        self._pending.wait()
        raise RuntimeError("Connection reset by peer")

    def when_done(self, callback: Any) -> None:
        """Never."""


class RefusesRows:
    """A transport that can't send the first rows it is given."""

    def __init__(self) -> None:
        self.num_refused = 0

    def posted(self, name: str, pending: Pending, num_bytes: int) -> Pending:
        if name == "dispatch rows" and not self.num_refused:
            pending.wait()
            self.num_refused += 1
            raise OSError("no buffer space")
        return pending


def failing_job(rank: int) -> list[str]:
    """What those who wait are told, of lost counts and of rows that can't be sent; and that nobody is told that it was done."""
    told = []
    exchanges, done = Exchanges(rank, LosesCounts()), threading.Event()
    lost = exchanges.start(0)
    lost.when_done(done.set)
    for _ in range(2):
        try:
            lost.wait()
        except RuntimeError as error:
            told.append(str(error))
    exchanges = Exchanges(rank, transport := RefusesRows())
    refused, following = exchanges.start(0), exchanges.start(1)
    refused.when_done(done.set)
    wait_for(lambda: transport.num_refused)
    exchanges.check(1, following)
    try:
        refused.wait()
    except RuntimeError as error:
        told.append(str(error))
    assert not done.is_set()
    return told
