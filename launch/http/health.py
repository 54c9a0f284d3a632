"""Are the ranks alive and moving? Judged from their heartbeats alone.

A rank is red when its last heartbeat is too old (process gone, machine gone, stopped) or when it has been in one
operation for too long (a hung collective: the heartbeat comes from a thread and goes on). Knows no sockets and no
requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from moesaic.launch.engine.messages import Heartbeat, RebalanceStatus

# In these a rank waits for work: they may last for ever.
RESTING = frozenset({"idle", "wait"})


class HealthMonitor:
    """Collects heartbeats; `problem()` is None when all ranks are well, else one line naming rank and operation."""

    def __init__(
        self,
        world_size: int,
        *,
        heartbeat_deadline: float = 5.0,
        watchdog_timeout: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deadline = heartbeat_deadline
        self._watchdog_timeout = watchdog_timeout
        self._clock = clock
        start = clock()
        self._seen = [start] * world_size
        self._last: list[Heartbeat | None] = [None] * world_size

    def observe(self, beat: Heartbeat) -> None:
        if 0 <= beat.rank < len(self._seen):
            self._seen[beat.rank] = self._clock()
            self._last[beat.rank] = beat

    def restart(self) -> None:
        """Count silence from now on: called when serving starts, as ranks may be silent while they load."""
        self._seen = [self._clock()] * len(self._seen)

    def rebalance(self) -> RebalanceStatus | None:
        """The state of rebalancing: a degraded rank's if there is one, else rank 0's; None where experts do not move."""
        statuses = [beat.rebalance for beat in self._last if beat is not None and beat.rebalance is not None]
        return next((status for status in statuses if status.degraded), statuses[0] if statuses else None)

    def problem(self) -> str | None:
        now = self._clock()
        for rank, (seen, beat) in enumerate(zip(self._seen, self._last, strict=True)):
            operation = "start-up" if beat is None else beat.operation
            silence = now - seen
            if silence > self._deadline:
                return f"rank {rank} has sent no heartbeat for {silence:.1f} s; its last operation was {operation!r}"
            if beat is not None and operation not in RESTING:
                stuck = beat.seconds + silence
                if stuck > self._watchdog_timeout:
                    return f"rank {rank} has been in operation {operation!r} for {stuck:.0f} s (step {beat.step})"
        return None
