"""How long forwards take with and without weights on the move: the measured side of whether to rebalance."""

from __future__ import annotations

from moesaic.eplb.decision import Measured


class ServingTime:
    """Of one rank; all times in seconds on the caller's clock."""

    def __init__(self, cost_s_per_byte: float) -> None:
        """`cost_s_per_byte`: assumed until a move has been measured."""
        self._cost_s_per_byte = cost_s_per_byte
        self._forward_s = 0.0
        self._began: float | None = None
        self._num_quiet = self._num_moving = 0
        self._quiet_s = self._moving_s = 0.0
        self.last_cost_s = 0.0

    def begin_forward(self, now: float) -> None:
        self._began = now

    def end_forward(self, now: float, *, moving: bool) -> None:
        """`moving`: weights moved meanwhile. Without effect when no forward was begun."""
        if self._began is None:
            return
        elapsed, self._began = now - self._began, None
        if moving:
            self._num_moving += 1
            self._moving_s += elapsed
        else:
            self._num_quiet += 1
            self._quiet_s += elapsed
            self._forward_s = self._quiet_s / self._num_quiet

    def spend_moving(self, seconds: float) -> None:
        """Time that the manager itself took from serving."""
        self._moving_s += seconds

    def end_move(self, busiest_bytes: int) -> None:
        """A cycle has moved so many bytes in and out of the busiest GPU: learn what it cost beyond its forwards' usual time."""
        self.last_cost_s = max(self._moving_s - self._num_moving * self._forward_s, 0.0)
        if busiest_bytes:
            self._cost_s_per_byte += (self.last_cost_s / busiest_bytes - self._cost_s_per_byte) / 2

    def begin_window(self) -> None:
        """Measure afresh; the mean forward of the last window stays until there is a new one."""
        self._num_quiet = self._num_moving = 0
        self._quiet_s = self._moving_s = 0.0

    def measured(self) -> Measured:
        return Measured(forward_s=self._forward_s, cost_s_per_byte=self._cost_s_per_byte)
