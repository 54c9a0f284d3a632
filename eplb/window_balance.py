"""How evenly a window's load lay on the GPUs: all of it and each forward mode's, every figure beside its bound.

A window is what was counted between two rebalances; its loads are summed before they are compared, so a figure says how the
placement suits the load, not how single batches vary around it. Knows arrays, not how they were counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.eplb.balancedness import balancedness, gpu_loads
from moesaic.eplb.bounds import gap, replica_bound
from moesaic.eplb.forward_mode import FORWARD_MODES
from moesaic.eplb.location import ExpertLocation, Int64Array

ALL = "all"
"""The forward modes together."""


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Means over sparse layers: of mean / max GPU load, and of the most that any placement in as many slots could have had."""

    balancedness: float
    bound: float

    @property
    def gap(self) -> float:
        """See bounds.gap."""
        return gap(self.balancedness, self.bound)


def window_balance(location: ExpertLocation, counts: Int64Array) -> dict[str, Balance]:
    """counts int64 [M, L, E], M as FORWARD_MODES -> the balance of ALL and of each mode. What had no tokens is absent."""
    loads = {ALL: counts.sum(axis=0), **dict(zip(FORWARD_MODES, counts, strict=True))}
    return {mode: load_balance(location, load) for mode, load in loads.items() if load.any()}


def load_balance(location: ExpertLocation, load: Int64Array) -> Balance:
    """Of counts int64 [L, E], an expert's split evenly over its replicas."""
    bound = replica_bound(load, location.num_slots, location.ep_size)
    return Balance(
        balancedness=float(balancedness(gpu_loads(location, load)).mean()),
        bound=float(bound.balancedness.mean()),
    )


def describe(balances: dict[str, Balance], predicted: Balance | None) -> str:
    """A line for the log. predicted: the balance of ALL after a move; None, or equal to the present one, where nothing moves."""
    words = []
    for mode, balance in balances.items():
        name = "balancedness" if mode == ALL else mode
        value, below = f"{balance.balancedness:.3f}", f"{balance.gap:.1%}"
        if mode == ALL and predicted is not None and predicted != balance:
            value, below = f"{value} -> {predicted.balancedness:.3f}", f"{below} -> {predicted.gap:.1%}"
        words.append(f"{name} {value} of at most {balance.bound:.3f} (gap {below})")
    return "; ".join(words) or "no balancedness without tokens"
