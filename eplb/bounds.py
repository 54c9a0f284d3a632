"""How good a placement, and how good any placement, could be: optima and lower bounds of the largest GPU load.

For one placement: the best split of every expert's load over its replicas, in any fractions (an even split is one of them). It is a
linear program, solved here exactly by scipy's HiGHS. Over all placements: no GPU can have less than the mean, and with only so many
slots some replica of a hot expert is at least so large. Every reported balancedness stands beside one of these.

    L layers, E logical experts, R slots on G GPUs
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.eplb.algorithm_deepseek import replicate_experts
from moesaic.eplb.location import ExpertLocation, Int64Array

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LoadBound:
    """The least largest GPU load of every layer, float64 [L], in the unit of the loads; `mean_load` is the mean over GPUs [L]."""

    max_load: FloatArray
    mean_load: FloatArray

    @property
    def balancedness(self) -> FloatArray:
        """Mean / max, [L]: the most any even or uneven split of this kind can reach. 1.0 for a layer without load."""
        return np.divide(self.mean_load, self.max_load, out=np.ones_like(self.mean_load), where=self.max_load > 0)


def optimal_split(location: ExpertLocation, loads: ArrayLike) -> LoadBound:
    """The optimum over all fractional splits for this placement: loads [L, E] not negative.

    Raises ValueError for loads of another shape, ImportError when scipy is not there.
    """
    values = np.asarray(loads, dtype=np.float64)
    if values.shape != (location.num_layers, location.num_experts):
        expected = f"[{location.num_layers} layers, {location.num_experts} experts]"
        raise ValueError(f"loads must be {expected} as the placement, got {list(values.shape)}")
    max_load = np.array(
        [
            _least_max_load(load, location.gpu_of(np.arange(location.num_slots)), slots, location.ep_size)
            for load, slots in zip(values, location.physical_to_logical, strict=True)
        ]
    )
    return LoadBound(max_load=max_load, mean_load=values.sum(axis=1) / location.ep_size)


def mean_bound(loads: ArrayLike, num_gpus: int) -> LoadBound:
    """loads [L, E]: some GPU has at least the mean."""
    mean_load: FloatArray = np.asarray(loads, dtype=np.float64).sum(axis=1) / num_gpus
    return LoadBound(max_load=mean_load, mean_load=mean_load)


def replica_bound(loads: ArrayLike, num_slots: int, num_gpus: int) -> LoadBound:
    """Over all placements in `num_slots` slots: the mean bound, or the largest replica when that is more.

    An expert with c replicas, at most one of which counts per GPU, puts load / c on some GPU however it is split. Giving each slot
    beyond one per expert to the largest load / c makes the largest of those as small as it can be.
    """
    values = np.asarray(loads, dtype=np.float64)
    if num_slots < values.shape[1]:
        raise ValueError(f"{num_slots} slots are too few for {values.shape[1]} experts")
    mean_load = values.sum(axis=1) / num_gpus
    _, _, count = replicate_experts(values, num_slots)
    largest_piece = (values / np.minimum(count, num_gpus)).max(axis=1)
    return LoadBound(max_load=np.maximum(mean_load, largest_piece), mean_load=mean_load)


def gap(value: float, bound: float) -> float:
    """How far below its bound a balancedness is, as a fraction of the bound: 0 is optimal."""
    return max(0.0, 1.0 - value / bound)


def _least_max_load(load: FloatArray, gpu_of_slot: Int64Array, expert_of_slot: Int64Array, num_gpus: int) -> float:
    """One layer. Variables: the share of each slot in the layer's load, and the largest GPU's share, which is minimised."""
    try:
        optimize, sparse = import_module("scipy.optimize"), import_module("scipy.sparse")
    except ImportError as error:
        raise ImportError("the optimal split of a placement needs scipy: pip install 'moesaic[report]'") from error
    total = float(load.sum())
    if total == 0:
        return 0.0
    num_slots = len(expert_of_slot)
    slots = np.arange(num_slots)
    ones = np.ones(num_slots)
    # Every GPU: sum of its slots - largest <= 0. Every expert: sum of its slots = its share.
    rows = np.concatenate([gpu_of_slot, np.arange(num_gpus)])
    columns = np.concatenate([slots, np.full(num_gpus, num_slots)])
    at_most = sparse.coo_array((np.concatenate([ones, -np.ones(num_gpus)]), (rows, columns)), shape=(num_gpus, num_slots + 1))
    equal = sparse.coo_array((ones, (expert_of_slot, slots)), shape=(len(load), num_slots + 1))
    result = optimize.linprog(
        np.append(np.zeros(num_slots), 1.0),
        A_ub=at_most.tocsr(),
        b_ub=np.zeros(num_gpus),
        A_eq=equal.tocsr(),
        b_eq=load / total,
        method="highs",
    )
    assert result.status == 0, f"a split always exists, but HiGHS says: {result.message}"
    return float(result.fun) * total
