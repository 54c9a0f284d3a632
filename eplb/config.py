"""Settings of rebalancing, named after their flags where they have one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RebalanceConfig:
    """When to rebalance, and how much a step may spend on it. Raises ValueError naming the field.

    num_iterations: forwards between two cycles (`--eplb-rebalance-num-iterations`). layers_per_chunk: after so many layers one
    step passes in which nothing moves (`--eplb-rebalance-layers-per-chunk`); None: no pause. min_utilization: no rebalance while
    the balancedness of the last window is above it (`--eplb-min-rebalancing-utilization-threshold`); 1.0: never held back by it.
    These three mean what they mean in SGLang.

    step_budget_s: work done in one step, but for one commit. The deadlines are per phase, `move` per layer; `drain` bounds how long
    an abandoned cycle waits for messages that are under way. max_quarantined: with more abandoned receives than this still open,
    no new cycle begins.

    horizon_steps: forwards over which a placement must pay for its move; None: num_iterations. moe_share: part of a forward's time
    that shrinks with the busiest GPU's load. cost_s_per_gib: serving time lost per GiB in or out of the busiest GPU, until a cycle
    has measured it.
    """

    num_iterations: int = 1000
    layers_per_chunk: int | None = None
    min_utilization: float = 1.0
    step_budget_s: float = 0.0005
    gather_deadline_s: float = 10.0
    plan_deadline_s: float = 30.0
    move_deadline_s: float = 10.0
    drain_deadline_s: float = 5.0
    max_quarantined: int = 64
    horizon_steps: int | None = None
    moe_share: float = 0.5
    cost_s_per_gib: float = 0.1

    def __post_init__(self) -> None:
        positive = (
            "num_iterations",
            "step_budget_s",
            "gather_deadline_s",
            "plan_deadline_s",
            "move_deadline_s",
            "drain_deadline_s",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("layers_per_chunk", "horizon_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        for name in ("min_utilization", "moe_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("cost_s_per_gib", "max_quarantined"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def horizon(self) -> int:
        """Forwards over which a move must pay."""
        return self.horizon_steps or self.num_iterations
