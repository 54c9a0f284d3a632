"""A recorded load replayed on an imagined cluster, rebalanced every so many windows.

A placement is solved from the windows of the last interval (in-sample) and then carries those of the next one (next-window,
out-of-sample: what a server gets). Replays of all intervals carry the same windows, so that they compare. Both figures are the mean
over layers of mean / max GPU load, then the mean over windows weighted by tokens, and stand beside the bound: the most that any
placement with as many slots could have, were it made for each window by itself.

    W windows, L sparse layers, E experts, R slots, G GPUs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from moesaic.eplb.algorithm import place_experts
from moesaic.eplb.balancedness import balancedness, gpu_loads
from moesaic.eplb.location import ExpertLocation, Int64Array
from moesaic.eplb.report import BadReport, placement_bound


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a placement is made for. num_groups: of experts, where group-limited routing profits from nodes; 1 is none."""

    ep_size: int
    num_slots: int
    num_nodes: int = 1
    num_groups: int = 1


@dataclass(frozen=True, kw_only=True)
class PlanPoint:
    """One setting and what the replay gave. policy "none" is without EPLB: slot s holds expert s % E, whatever the load.

    interval: windows of the record between two placements, None without EPLB. next_window: None when there is no window after the
    first placement. first_bytes: received by all GPUs together for the first placement, coming from the trivial one;
    bytes_per_rebalance: for a later one, on average, None if there is none; busiest_gpu_bytes: most that one GPU received for a
    later one (for the first, if there is none).
    """

    ep_size: int
    num_slots: int
    num_redundant_experts: int
    policy: str
    interval: int | None
    in_sample: float
    next_window: float | None
    bound: float
    num_rebalances: int
    first_bytes: int
    bytes_per_rebalance: float | None
    busiest_gpu_bytes: int

    @property
    def figure(self) -> float:
        """What decides: next-window balancedness, or in-sample where the record has no next window."""
        return self.in_sample if self.next_window is None else self.next_window


@dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """counts int64 [W, L, E], the first `warm_up` of which are only learnt from; run: windows of the record in each of them."""

    counts: Int64Array
    warm_up: int
    run: int
    expert_bytes: int

    @property
    def num_experts(self) -> int:
        return int(self.counts.shape[2])

    def without_eplb(self, cluster: Cluster) -> PlanPoint:
        """The trivial placement throughout."""
        location = self._trivial(cluster)
        carried = self._carried
        return self._point(
            cluster,
            policy="none",
            interval=None,
            in_sample=_felt(location, self.counts),
            next_window=_felt(location, carried) if len(carried) else None,
            received=[],
        )

    def rebalanced(self, cluster: Cluster, algorithm: str, interval: int) -> PlanPoint:
        """A new placement every `interval` windows of `counts`, by the algorithm of this name."""
        location = self._trivial(cluster)
        in_sample, next_window, weights, received = [], [], [], []
        for before, after in self._intervals(interval):
            solved = solve(before.sum(axis=0), cluster, algorithm, previous=location)
            received.append(experts_received(location, solved))
            location = solved
            in_sample.append(_felt(location, before))
            if len(after):
                next_window.append(_felt(location, after))
                weights.append(after.sum())
        return self._point(
            cluster,
            policy=algorithm,
            interval=interval * self.run,
            in_sample=float(np.mean(in_sample)),
            next_window=float(np.average(next_window, weights=weights)) if any(weights) else None,
            received=received,
        )

    @property
    def _carried(self) -> Int64Array:
        return self.counts[self.warm_up :]

    def _intervals(self, interval: int) -> Iterator[tuple[Int64Array, Int64Array]]:
        """Windows to learn from and windows to carry, for every rebalance."""
        for at in range(self.warm_up, max(len(self.counts), self.warm_up + 1), interval):
            yield self.counts[at - interval : at], self.counts[at : at + interval]

    def _trivial(self, cluster: Cluster) -> ExpertLocation:
        return ExpertLocation.trivial(
            num_layers=self.counts.shape[1],
            num_experts=self.num_experts,
            num_slots=cluster.num_slots,
            ep_size=cluster.ep_size,
            num_nodes=cluster.num_nodes,
        )

    def _point(
        self,
        cluster: Cluster,
        *,
        policy: str,
        interval: int | None,
        in_sample: float,
        next_window: float | None,
        received: list[Int64Array],
    ) -> PlanPoint:
        later = received[1:]
        return PlanPoint(
            ep_size=cluster.ep_size,
            num_slots=cluster.num_slots,
            num_redundant_experts=cluster.num_slots - self.num_experts,
            policy=policy,
            interval=interval,
            in_sample=in_sample,
            next_window=next_window,
            bound=self._bound(cluster.num_slots, cluster.ep_size),
            num_rebalances=len(received),
            first_bytes=int(received[0].sum()) * self.expert_bytes if received else 0,
            bytes_per_rebalance=float(np.mean([each.sum() for each in later])) * self.expert_bytes if later else None,
            busiest_gpu_bytes=max((int(each.max()) for each in later or received), default=0) * self.expert_bytes,
        )

    @cache  # noqa: B019 - a replay lives as long as its plan is made
    def _bound(self, num_slots: int, ep_size: int) -> float:
        windows = self._carried if len(self._carried) else self.counts
        by_window = placement_bound(windows, num_slots, ep_size).mean(axis=-1)
        return float(np.average(by_window, weights=windows.sum(axis=(1, 2))))


def solve(counts: Int64Array, cluster: Cluster, algorithm: str, previous: ExpertLocation | None = None) -> ExpertLocation:
    """A placement for counts [L, E]. Raises BadReport naming the algorithm when it can't place on such a cluster."""
    try:
        return place_experts(
            counts,
            num_slots=cluster.num_slots,
            ep_size=cluster.ep_size,
            num_nodes=cluster.num_nodes,
            num_groups=cluster.num_groups,
            algorithm=algorithm,
            previous=previous,
        )
    except ValueError as error:
        raise BadReport(f"algorithm {algorithm} on {cluster.ep_size} GPUs: {error}") from error


def experts_received(before: ExpertLocation, after: ExpertLocation) -> Int64Array:
    """Experts that each GPU has to get from another one, all layers together: int64 [G]. Moves inside a GPU cost nothing."""
    received: Int64Array = (_held(after) & ~_held(before)).sum(axis=(0, 2))
    return received


def _held(location: ExpertLocation) -> np.ndarray[tuple[int, int, int], np.dtype[np.bool_]]:
    """Which experts lie on which GPU: [L, G, E]."""
    held = np.zeros((location.num_layers, location.ep_size, location.num_experts), dtype=np.bool_)
    layers = np.arange(location.num_layers)[:, None]
    held[layers, location.gpu_of(np.arange(location.num_slots)), location.physical_to_logical] = True
    return held


def _felt(location: ExpertLocation, windows: Int64Array) -> float:
    """Balancedness of windows [W, L, E]: mean over layers, then over windows weighted by tokens."""
    weights = windows.sum(axis=(1, 2))
    by_window = balancedness(gpu_loads(location, windows)).mean(axis=-1)
    return float(np.average(by_window, weights=weights)) if weights.any() else float(by_window.mean())
