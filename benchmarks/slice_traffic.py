"""What one rank of an EP group receives in a dispatch: how many rows each of its experts gets, and from which tokens. Pure numpy.

The model. Every rank dispatches T tokens of K choices, so a rank receives T * K rows in the mean and the busiest one
T * K / balancedness; the slice is that rank. Balanced (1.0), its experts get equally many. Below, each layer's demand for the
logical experts is drawn lognormal(0, 1) as in bench_eplb.py, placed on all ranks by our own balancer, and the busiest rank's slots
share its rows as they share its demand: what serving looks like when the demand has moved away from the placement. Each expert's
rows come from distinct tokens of all ranks, chosen alike and independently of the rank's other experts; group-limited gating would
let them coincide more often, so the slice receives rather too many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import bare_import  # noqa: F401  before anything of moesaic
import numpy as np
from numpy.typing import NDArray

from moesaic.eplb import rebalance_experts

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """One rank among `ep_size`, with its equal part of `num_slots` for `num_experts`; `topk` choices per token."""

    ep_size: int
    num_slots: int
    num_experts: int
    topk: int

    def __post_init__(self) -> None:
        if self.num_slots % self.ep_size:
            raise ValueError(f"{self.num_slots} slots can't be dealt evenly to {self.ep_size} ranks")

    @property
    def num_local(self) -> int:
        return self.num_slots // self.ep_size


def rows_received(place: RankPlace, num_tokens: int, balancedness: float) -> int:
    """Rows of the busiest rank when every rank dispatches `num_tokens`. Raises ValueError for a balancedness no rank can reach."""
    rows = round(num_tokens * place.topk / balancedness)
    most = num_tokens * place.ep_size * min(place.topk, place.num_local)
    if not 0 < balancedness <= 1 or rows > most:
        raise ValueError(f"balancedness {balancedness} is not in [{num_tokens * place.topk / most:.3g}, 1] for EP {place.ep_size}")
    return rows


def expert_counts(place: RankPlace, num_tokens: int, balancedness: float, pattern: int) -> Ints:
    """Rows of each local expert, int64 [num_local]; `pattern` is the seed."""
    rows = rows_received(place, num_tokens, balancedness)
    shares = np.full(place.num_local, 1 / place.num_local) if balancedness == 1 else busiest_shares(place, pattern)
    most = num_tokens * place.ep_size
    counts = np.minimum(np.floor(shares * rows), most).astype(np.int64)
    while (missing := rows - int(counts.sum())) > 0:
        free = np.flatnonzero(counts < most)
        chosen = free[np.argsort(-(shares * rows - counts)[free], kind="stable")][:missing]
        counts[chosen] += 1
    return counts


def busiest_shares(place: RankPlace, pattern: int) -> Floats:
    """Shares of its experts in the rows of the busiest rank, [num_local], summing to 1."""
    demand = np.random.default_rng(pattern).lognormal(0, 1, (1, place.num_experts))
    placed, _, replicas = rebalance_experts(demand, place.num_slots, 1, 1, place.ep_size)
    per_slot = (demand[0] / replicas.numpy()[0])[placed.numpy()[0]].reshape(place.ep_size, place.num_local)
    busiest = per_slot[per_slot.sum(axis=1).argmax()]
    shares: Floats = busiest / busiest.sum()
    return shares


def expected_received(counts: list[int], num_sources: int) -> int:
    """Tokens that `assign_tokens` makes of these rows, in the mean."""
    elsewhere = np.prod(1 - np.array(counts) / num_sources)
    return round(num_sources * (1 - float(elsewhere)))


def assign_tokens(counts: Ints, num_sources: int, topk: int, pattern: int) -> Ints:
    """Rows of each local expert -> local ids of the received tokens, int64 [M, topk], -1 = an expert elsewhere.

    Each expert's rows are of distinct tokens among `num_sources`; M are those that anything was chosen of. Raises ValueError when
    an expert is to have more rows than there are tokens.
    """
    if counts.max(initial=0) > num_sources:
        raise ValueError(f"an expert is to receive {counts.max()} rows, but there are {num_sources} tokens")
    rng = np.random.default_rng(pattern)
    ids = np.full((num_sources, topk), -1, dtype=np.int64)
    taken = np.zeros(num_sources, dtype=np.int64)
    for expert, count in enumerate(counts.tolist()):
        free = np.flatnonzero(taken < topk)
        chosen = rng.choice(free, count, replace=False, shuffle=False)
        ids[chosen, taken[chosen]] = expert
        taken[chosen] += 1
    return ids[taken > 0]
