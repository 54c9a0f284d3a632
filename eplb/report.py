"""The balancedness report as data: how evenly placements carry a recorded load, and how far each is from what is possible.

Knows a load record and placements, not how a report looks (`report_html.py`, `report_png.py`, the command line). Every balancedness
(mean / max of GPU load, an expert's load split evenly over its replicas) stands beside its bound, the most that any placement with
as many slots can have, and the gap 1 - balancedness / bound. Two averages are kept apart:

    whole record   counts summed over all windows, then the plain mean over layers: what a placement can know
    per window     the plain mean over layers of each window, then the mean over windows weighted by their tokens: what steps felt

L sparse layers, E experts, G GPUs, P points in time (windows, or even runs of them when there are many).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic.eplb import bounds
from moesaic.eplb.balancedness import (
    balancedness,
    gpu_loads,
    sglang_balancedness,
    tensorrt_llm_imbalance,
    vllm_balancedness,
)
from moesaic.eplb.load_record import LoadRecord
from moesaic.eplb.location import ExpertLocation, Int64Array

FloatArray = NDArray[np.float64]

MAX_POINTS = 96
"""Points in time a report holds at most."""
NUM_HOT_EXPERTS = 12


class BadReport(ValueError):  # noqa: N818 - reads as what is wrong
    """A report that can't be made from this record and these placements: names the field or flag."""


@dataclass(frozen=True, kw_only=True)
class PeerFigures:
    """The whole record in the other projects' definitions (balancedness.py says what each averages)."""

    sglang: float
    vllm: float
    tensorrt_llm_imbalance: float


@dataclass(frozen=True, kw_only=True)
class PlacementReport:
    """How one placement carries the record.

    relative_load [L, G] is a GPU's load over the mean of its layer's (1.0 where the layer has none); by_layer, bound_by_layer and
    split_by_layer [L] are of the whole record, split_by_layer with the best fractional split of each expert over the replicas it
    has; by_point and bound_by_point [P] are means over layers.
    """

    name: str
    ep_size: int
    num_slots: int
    relative_load: FloatArray
    by_layer: FloatArray
    bound_by_layer: FloatArray
    split_by_layer: FloatArray | None
    by_point: FloatArray
    bound_by_point: FloatArray
    per_window: float
    per_window_bound: float
    peers: PeerFigures

    @property
    def balancedness(self) -> float:
        """Mean over layers, whole record."""
        return float(self.by_layer.mean())

    @property
    def bound(self) -> float:
        return float(self.bound_by_layer.mean())

    @property
    def split_optimum(self) -> float | None:
        return None if self.split_by_layer is None else float(self.split_by_layer.mean())

    @property
    def worst_layer(self) -> int:
        """Index of the sparse layer with the lowest balancedness."""
        return int(self.by_layer.argmin())


@dataclass(frozen=True, kw_only=True)
class HotExpert:
    """An expert far above the average of its layer. replicas: by placement, in the report's order."""

    layer_id: int
    expert: int
    share: float
    """Of its layer's load, 0 to 1."""
    times_mean: float
    replicas: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BalanceReport:
    """A record under one or more placements. point_starts [P]: the first window of each point in time."""

    source: str
    model: str
    domain: str
    layer_ids: tuple[int, ...]
    num_hidden_layers: int
    num_experts: int
    num_windows: int
    num_tokens: int | None
    point_starts: Int64Array
    placements: tuple[PlacementReport, ...]
    hot_experts: tuple[HotExpert, ...]


def shown_split(placement: PlacementReport) -> str:
    """The best split as text, or what it takes to know it."""
    return "needs scipy" if placement.split_optimum is None else f"{placement.split_optimum:.3f}"


def distinct_bounds(report: BalanceReport) -> list[tuple[int, PlacementReport]]:
    """The placements, with their index, whose bound no earlier one has: those of as many slots share it."""
    first: dict[tuple[int, int], int] = {}
    for index, each in enumerate(report.placements):
        first.setdefault((each.num_slots, each.ep_size), index)
    return [(index, report.placements[index]) for index in first.values()]


def merge_windows(counts: Int64Array, max_windows: int) -> tuple[Int64Array, Int64Array]:
    """Counts [W, L, E] summed over even runs of windows so that at most `max_windows` remain, and the first window of each."""
    run = -(-len(counts) // max_windows)
    starts = np.arange(0, len(counts), run)
    return np.add.reduceat(counts, starts, axis=0), starts


def placement_bound(counts: Int64Array, num_slots: int, num_gpus: int) -> FloatArray:
    """The most balancedness any placement in so many slots can have: counts [..., L, E] -> [..., L]."""
    rows = counts.reshape(-1, counts.shape[-1])
    return bounds.replica_bound(rows, num_slots, num_gpus).balancedness.reshape(counts.shape[:-1])


def balance_report(
    record: LoadRecord,
    placements: Mapping[str, ExpertLocation],
    *,
    source: str = "",
    num_hidden_layers: int | None = None,
) -> BalanceReport:
    """The record under each placement, in the mapping's order. Raises BadReport when one is not of the record's layers and experts.

    num_hidden_layers: all layers of the model, for SGLang's definition; by default the last sparse layer is the model's last.
    """
    num_layers, num_experts = record.logical_count.shape[1:]
    for name, location in placements.items():
        if (location.num_layers, location.num_experts) != (num_layers, num_experts):
            raise BadReport(
                f"placement '{name}' has {location.num_layers} sparse layers of {location.num_experts} experts, but the load has "
                f"{num_layers} of {num_experts}"
            )
    if not record.logical_count.any():
        raise BadReport(f"{source or 'the load'}: field 'logical_count' is all zero, so there is no balance to report")
    last = int(record.layer_ids[-1]) + 1
    hidden = last if num_hidden_layers is None else num_hidden_layers
    if hidden < last:
        raise BadReport(f"num_hidden_layers is {hidden}, but the load has a layer {last - 1}")
    run = -(-len(record.logical_count) // MAX_POINTS)
    starts = np.arange(0, len(record.logical_count), run)
    return BalanceReport(
        source=source,
        model=record.model,
        domain=record.domain,
        layer_ids=tuple(record.layer_ids.tolist()),
        num_hidden_layers=hidden,
        num_experts=num_experts,
        num_windows=len(record.logical_count),
        num_tokens=None if record.num_tokens is None else int(record.num_tokens.sum()),
        point_starts=starts,
        placements=tuple(
            _placement_report(name, location, record.logical_count, starts, hidden) for name, location in placements.items()
        ),
        hot_experts=_hot_experts(record, tuple(placements.values())),
    )


def _placement_report(
    name: str, location: ExpertLocation, counts: Int64Array, starts: Int64Array, num_hidden_layers: int
) -> PlacementReport:
    total = counts.sum(axis=0)
    loads = gpu_loads(location, total)
    mean = loads.mean(axis=-1, keepdims=True)
    # In runs, because the loads of all slots in a thousand windows would be gigabytes.
    runs = np.split(counts, starts[1:])
    by_window = np.concatenate([balancedness(gpu_loads(location, run)).mean(axis=-1) for run in runs])
    bound = np.concatenate([placement_bound(run, location.num_slots, location.ep_size).mean(axis=-1) for run in runs])
    weights = counts.sum(axis=(1, 2))
    return PlacementReport(
        name=name,
        ep_size=location.ep_size,
        num_slots=location.num_slots,
        relative_load=np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0),
        by_layer=balancedness(loads),
        bound_by_layer=placement_bound(total, location.num_slots, location.ep_size),
        split_by_layer=_split_optimum(location, total),
        by_point=_mean_of_runs(by_window, weights, starts),
        bound_by_point=_mean_of_runs(bound, weights, starts),
        per_window=float(np.average(by_window, weights=weights)),
        per_window_bound=float(np.average(bound, weights=weights)),
        peers=PeerFigures(
            sglang=float(sglang_balancedness(loads, num_hidden_layers=num_hidden_layers)),
            vllm=float(vllm_balancedness(loads)),
            tensorrt_llm_imbalance=float(tensorrt_llm_imbalance(loads).mean()),
        ),
    )


def _split_optimum(location: ExpertLocation, total: Int64Array) -> FloatArray | None:
    """Balancedness [L] under the best fractional split; None without scipy, which solves for it."""
    try:
        return bounds.optimal_split(location, total).balancedness
    except ImportError:
        return None


def _mean_of_runs(values: FloatArray, weights: Int64Array, starts: Int64Array) -> FloatArray:
    """Weighted mean of every run of windows, values [W] -> [P]; a run without tokens is in balance."""
    total = np.add.reduceat(weights, starts)
    return np.divide(np.add.reduceat(values * weights, starts), total, out=np.ones(len(starts)), where=total > 0)


def _hot_experts(record: LoadRecord, locations: tuple[ExpertLocation, ...]) -> tuple[HotExpert, ...]:
    """The experts with the largest share of their layer's load, hottest first."""
    total = record.logical_count.sum(axis=0)
    share = total / np.maximum(total.sum(axis=1, keepdims=True), 1)
    hottest = np.argsort(-share, axis=None, kind="stable")[:NUM_HOT_EXPERTS]
    return tuple(
        HotExpert(
            layer_id=int(record.layer_ids[layer]),
            expert=int(expert),
            share=float(share[layer, expert]),
            times_mean=float(share[layer, expert] * total.shape[1]),
            replicas=tuple(int(location.logical_count[layer, expert]) for location in locations),
        )
        for layer, expert in zip(*np.unravel_index(hottest, share.shape), strict=True)
    )
