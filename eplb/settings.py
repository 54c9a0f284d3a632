"""What a server settles about its experts before any rank starts."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.location import ExpertLocation


@dataclass(frozen=True, kw_only=True)
class SlotOptions:
    """`location` None: every expert in one slot, in order, for good. `replica_choice`: see replica_choice.py.

    `movable`: a rebalance may change the location while serving. `seed` of what is left to chance; the same on all ranks.
    """

    location: ExpertLocation | None = None
    replica_choice: str = "static"
    movable: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RebalanceSettings:
    """`algorithm`: see algorithm.py. `moves` False: counts are gathered and balancedness is reported, nothing moves."""

    config: RebalanceConfig
    algorithm: str = "auto"
    moves: bool = True
