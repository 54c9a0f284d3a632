"""The first phase of a rebalance: the sum of all ranks' expert counts. Knows no process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from moesaic.eplb.location import Int64Array
from moesaic.eplb.transfer import PendingSum


class StartSum(Protocol):
    """Begins the sum of an array over all ranks; `cycle` keeps it apart from the sums of other cycles."""

    def __call__(self, array: Int64Array, cycle: int) -> PendingSum: ...


class Gather:
    """The sum of all ranks' counts, begun with the first `work`."""

    def __init__(self, start: Callable[[], PendingSum]) -> None:
        self._start = start
        self._pending: PendingSum | None = None

    def work(self, until: float) -> bool:
        """True when the sum is complete. Takes a part of a step, whatever `until`."""
        if self._pending is None:
            self._pending = self._start()
        return self._pending.done()

    def drain(self, until: float) -> bool:
        return self.work(until)

    def abandon(self) -> None:
        if self._pending is not None:
            self._pending.abandon()

    @property
    def waiting_for(self) -> int | None:
        return self._pending.waiting_for if self._pending is not None else None

    def result(self) -> Int64Array:
        assert self._pending is not None, "the sum was not begun"
        return self._pending.result()
