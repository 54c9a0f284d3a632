"""What a rank is doing now, for heartbeats and error messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from moesaic.eplb.status import RebalanceStatus


@dataclass(frozen=True, slots=True)
class Doing:
    """An operation of a step, and since when (seconds, monotonic)."""

    operation: str
    step: int
    since: float

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return time.monotonic() - self.since


class Activity:
    """Two threads write: the rank's loop, and the one that runs its forwards (both may be one). Any thread may read: each field is
    replaced whole, so no lock is needed.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.step = 0
        self.rebalance_status: Callable[[], RebalanceStatus] | None = None
        self._loop: Doing | None = Doing("start", 0, time.monotonic())
        self._forward = Doing("forward", 0, time.monotonic())

    def enter(self, operation: str) -> None:
        """The loop begins something."""
        self._loop = Doing(operation, self.step, time.monotonic())

    def wait_for_forward(self) -> None:
        """The loop does nothing but wait for the thread that runs forwards."""
        self._loop = None

    def enter_forward(self, operation: str, step: int) -> None:
        """The thread that runs forwards begins something; `step` may lie behind the loop's."""
        self._forward = Doing(operation, step, time.monotonic())

    def current(self) -> Doing:
        """What the rank is held up by: the loop's operation, or that of the forward which the loop waits for."""
        return self._loop or self._forward

    def describe(self) -> str:
        doing = self.current()
        return f"rank {self.rank}, step {doing.step}, in {doing.operation} for {doing.seconds:.1f} s"
