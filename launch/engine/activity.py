"""What a rank is doing now, for heartbeats and error messages."""

from __future__ import annotations

import time
from collections.abc import Callable

from moesaic.eplb.status import RebalanceStatus


class Activity:
    """Written by the rank's loop, read by its heartbeat thread; each field is replaced whole, so no lock is needed."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.step = 0
        self.rebalance_status: Callable[[], RebalanceStatus] | None = None
        self._now: tuple[str, float] = ("start", time.monotonic())

    def enter(self, operation: str) -> None:
        self._now = (operation, time.monotonic())

    def current(self) -> tuple[str, float]:
        """(operation, seconds in it)."""
        operation, since = self._now
        return operation, time.monotonic() - since

    def describe(self) -> str:
        operation, seconds = self.current()
        return f"rank {self.rank}, step {self.step}, in {operation} for {seconds:.1f} s"
