"""Whether a rebalance is worth its cost, and the plan it would carry out. Pure but for the thread that makes the plan.

The busiest GPU of a layer sets the time of its experts, so forwards speed up with the sum over layers of the largest GPU load.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from moesaic.eplb.balancedness import gpu_loads
from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.location import ExpertLocation, Int64Array
from moesaic.eplb.moves import LayerMoves, plan_moves
from moesaic.eplb.window_balance import ALL, Balance, load_balance, window_balance

Solve = Callable[[Int64Array, ExpertLocation], Int64Array]
"""Counts of all GPUs, int64 [L, E] over all forward modes, and the present placement -> the wanted one, int64 [L, R].

Pure, equal on all ranks.
"""


class Decision(IntEnum):
    """What to do with a plan."""

    MOVE = 0
    NO_LOAD = 1
    BALANCED = 2
    UNCHANGED = 3
    NOT_WORTH_IT = 4

    @property
    def text(self) -> str:
        return _REASONS[self]


_REASONS = {
    Decision.MOVE: "worth it",
    Decision.NO_LOAD: "no tokens were counted",
    Decision.BALANCED: "balancedness is above the threshold",
    Decision.UNCHANGED: "the wanted placement is the present one",
    Decision.NOT_WORTH_IT: "the saving is below the cost",
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What this rank has measured: seconds per forward, and serving time lost per byte in or out of the busiest GPU."""

    forward_s: float
    cost_s_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Window:
    """What was served since the last cycle: counts of all GPUs int64 [M, L, E], M as FORWARD_MODES, in so many forwards.

    `replaced`: the placement that would have served it, had the last cycle not moved anything; None if it hadn't.
    """

    counts: Int64Array
    num_forwards: int
    replaced: ExpertLocation | None


@dataclass(frozen=True, kw_only=True)
class CyclePlan:
    """The wanted placement, the layers that change with their moves, and what is expected of it.

    balances: of the window on the present placement (see window_balance); predicted: of its load on the wanted one, None without
    tokens. saving_s: over the horizon. realised_gain_s: what the last cycle has saved over that window.
    """

    location: ExpertLocation
    moves: tuple[tuple[int, LayerMoves], ...]
    decision: Decision
    balances: dict[str, Balance]
    predicted: Balance | None
    saving_s: float
    cost_s: float
    busiest_bytes: int
    realised_gain_s: float

    def digest(self) -> int:
        """24 bits that are equal for equal placements."""
        return zlib.crc32(np.ascontiguousarray(self.location.physical_to_logical).tobytes()) & 0xFFFFFF


def saved_share(before: ExpertLocation, after: ExpertLocation, counts: Int64Array) -> float:
    """Part of the experts' time with `before` that `after` saves on counts int64 [L, E]; negative if it is slower."""
    slow, fast = (float(gpu_loads(location, counts).max(axis=-1).sum()) for location in (before, after))
    return 1.0 - fast / slow if slow else 0.0


def make_plan(
    window: Window, location: ExpertLocation, *, solve: Solve, measured: Measured, expert_bytes: int, config: RebalanceConfig
) -> CyclePlan:
    """Solve for the window's counts and weigh the result. Raises what `solve` raises, ValueError for a bad placement."""
    counts: Int64Array = window.counts.sum(axis=0)
    balances = window_balance(location, window.counts)
    moe_s = measured.forward_s * config.moe_share
    if ALL not in balances:
        wanted, decision = location, Decision.NO_LOAD
    elif balances[ALL].balancedness > config.min_utilization:
        wanted, decision = location, Decision.BALANCED
    else:
        wanted, decision = _wanted(solve(counts, location), location), Decision.UNCHANGED
    moves = _changed_layers(location, wanted)
    busiest_bytes = _busiest_messages(moves) * expert_bytes
    saving_s = moe_s * config.horizon * saved_share(location, wanted, counts)
    cost_s = busiest_bytes * measured.cost_s_per_byte
    if moves:
        decision = Decision.MOVE if saving_s > cost_s else Decision.NOT_WORTH_IT
    realised = 0.0 if window.replaced is None else -saved_share(location, window.replaced, counts)
    return CyclePlan(
        location=wanted,
        moves=moves,
        decision=decision,
        balances=balances,
        predicted=load_balance(wanted, counts) if ALL in balances else None,
        saving_s=saving_s,
        cost_s=cost_s,
        busiest_bytes=busiest_bytes,
        realised_gain_s=moe_s * window.num_forwards * realised,
    )


def _wanted(slots: Int64Array, location: ExpertLocation) -> ExpertLocation:
    """A solver's answer as a placement on the same GPUs. Raises BadLocation."""
    return ExpertLocation(
        physical_to_logical=np.asarray(slots, dtype=np.int64),
        num_experts=location.num_experts,
        ep_size=location.ep_size,
        num_nodes=location.num_nodes,
    )


def _changed_layers(old: ExpertLocation, new: ExpertLocation) -> tuple[tuple[int, LayerMoves], ...]:
    """Raises ValueError when the placements are of different shapes."""
    before, after = old.physical_to_logical, new.physical_to_logical
    if before.shape != after.shape:
        raise ValueError(f"the solved placement has shape {list(after.shape)}, the present one {list(before.shape)}")
    layers = np.flatnonzero((before != after).any(axis=1)).tolist()
    return tuple((layer, plan_moves(before[layer], after[layer], ep_size=old.ep_size, num_nodes=old.num_nodes)) for layer in layers)


def _busiest_messages(moves: tuple[tuple[int, LayerMoves], ...]) -> int:
    """Experts in or out of the GPU with the most of them, over all layers."""
    ends = Counter(gpu for _, layer in moves for move in layer.messages for gpu in (move.source, move.destination))
    return max(ends.values(), default=0)


class BackgroundPlan:
    """A plan in the making, in a thread of its own; one that never ends harms nobody but its thread."""

    waiting_for: int | None = None

    def __init__(self, make: Callable[[], CyclePlan]) -> None:
        self._make = make
        self._plan: CyclePlan | None = None
        self._error: Exception | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="eplb-planner", daemon=True).start()

    def _run(self) -> None:
        try:
            self._plan = self._make()
        except Exception as error:
            self._error = error
        self._ended.set()

    def ended(self) -> bool:
        return self._ended.is_set()

    def work(self, until: float) -> bool:
        """True when the plan is made; raises what making it raised."""
        if self._ended.is_set() and self._error is not None:
            raise self._error
        return self._ended.is_set()

    def drain(self, until: float) -> bool:
        """Nobody else waits for a plan, so there is nothing to bring to an end."""
        return True

    def abandon(self) -> None:
        """The thread goes on alone; what it makes is dropped."""

    def result(self) -> CyclePlan:
        """The plan, once done."""
        assert self._plan is not None, "the plan is not made yet"
        return self._plan
