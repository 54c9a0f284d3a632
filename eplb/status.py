"""What a rebalance manager says of itself, for health, metrics and logs."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.eplb.window_balance import Balance


@dataclass(frozen=True, kw_only=True)
class RebalanceStatus:
    """Times in seconds. `last_` figures are 0 and texts empty before there is one.

    degraded: the last cycle was abandoned (why: last_cause, which stays after recovery), a stalled planner is still stuck, or
    messages are quarantined. layers_done of layers_total: of the last cycle that moved any; layers_moved: of all cycles.
    bytes_moved: weights that this rank has received, ever. last_balances: of the last window, by "all" and forward mode, of those
    that had tokens in it. last_predicted: what the last plan promised for the same load; None without a plan or tokens.
    Savings, costs and gains are of serving time: predicted over the horizon, realised over the window since.
    """

    phase: str
    cycle: int
    layers_done: int
    layers_total: int
    layers_moved: int
    committed_cycles: int
    abandoned_cycles: int
    skipped_cycles: int
    degraded: bool
    last_cause: str
    last_skip_reason: str
    stalled_planners: int
    quarantined_messages: int
    bytes_moved: int
    last_plan_s: float
    last_move_s: float
    last_longest_commit_s: float
    last_balances: dict[str, Balance]
    last_predicted: Balance | None
    last_predicted_saving_s: float
    last_predicted_cost_s: float
    last_measured_cost_s: float
    last_realised_gain_s: float
