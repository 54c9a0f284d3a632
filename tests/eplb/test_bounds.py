"""The bounds are never above what a placement reaches, and the optimal split is the optimum that search by other means finds."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.eplb import rebalance_experts
from moesaic.eplb.balancedness import balancedness, gpu_loads
from moesaic.eplb.bounds import mean_bound, optimal_split, replica_bound
from moesaic.eplb.location import ExpertLocation

pytest.importorskip("scipy", reason="the optimal split needs scipy")


def place(loads: np.ndarray, num_slots: int, num_gpus: int) -> ExpertLocation:
    placed, _, _ = rebalance_experts(loads, num_slots, 1, 1, num_gpus)
    return ExpertLocation(physical_to_logical=placed.numpy(), num_experts=loads.shape[1], ep_size=num_gpus)


def most_loaded_set(location: ExpertLocation, load: np.ndarray, layer: int) -> float:
    """The optimum by min-cut: the largest, over sets of GPUs, of the load that can go nowhere else, per GPU of the set."""
    gpus = range(location.ep_size)
    gpus_of = [
        {int(slot) // location.slots_per_gpu for slot in slots if slot >= 0} for slots in location.logical_to_physical[layer]
    ]
    subsets = chain.from_iterable(combinations(gpus, size) for size in range(1, location.ep_size + 1))
    return max(sum(x for x, on in zip(load, gpus_of, strict=True) if on <= set(subset)) / len(subset) for subset in subsets)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 3))
def test_the_optimal_split_is_the_min_cut(seed: int, num_gpus: int, slots_per_gpu: int) -> None:
    rng = np.random.default_rng(seed)
    num_slots = num_gpus * slots_per_gpu
    num_experts = int(rng.integers(1, num_slots + 1))
    loads = rng.lognormal(0, 1.5, (1, num_experts))
    slots = rng.permutation(np.concatenate([np.arange(num_experts), rng.integers(0, num_experts, num_slots - num_experts)]))
    location = ExpertLocation(physical_to_logical=slots[None], num_experts=num_experts, ep_size=num_gpus)
    assert optimal_split(location, loads).max_load[0] == pytest.approx(most_loaded_set(location, loads[0], 0), rel=1e-6)


def test_an_uneven_split_is_found_where_it_is_better() -> None:
    """Expert 0 lies on both GPUs, expert 1 only on GPU 0: all of expert 0 belongs on GPU 1."""
    location = ExpertLocation(physical_to_logical=np.array([[0, 1, 0, 2]]), num_experts=3, ep_size=2)
    loads = np.array([[10.0, 10.0, 0.0]])
    bound = optimal_split(location, loads)
    np.testing.assert_allclose(bound.max_load, [10.0])
    np.testing.assert_allclose(bound.balancedness, [1.0])
    np.testing.assert_allclose(balancedness(gpu_loads(location, loads)), [2 / 3])


def test_a_layer_without_load_is_in_balance() -> None:
    location = ExpertLocation.trivial(num_layers=2, num_experts=4, num_slots=4, ep_size=2)
    np.testing.assert_array_equal(optimal_split(location, np.zeros((2, 4))).balancedness, [1.0, 1.0])
    np.testing.assert_array_equal(replica_bound(np.zeros((2, 4)), 4, 2).balancedness, [1.0, 1.0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 4))
def test_bounds_are_in_order(seed: int, num_gpus: int, slots_per_gpu: int) -> None:
    """mean <= replica-limited <= the even split of a placement, and mean <= optimal split <= even split."""
    rng = np.random.default_rng(seed)
    num_slots = num_gpus * slots_per_gpu
    loads = rng.lognormal(0, 1.5, (3, int(rng.integers(1, num_slots + 1))))
    location = place(loads, num_slots, num_gpus)
    even = gpu_loads(location, loads).max(axis=1) * (1 + 1e-9)
    split, pieces, mean = optimal_split(location, loads), replica_bound(loads, num_slots, num_gpus), mean_bound(loads, num_gpus)
    assert (mean.max_load <= pieces.max_load).all()
    assert (pieces.max_load <= even).all()
    assert (mean.max_load <= split.max_load * (1 + 1e-9)).all()
    assert (split.max_load <= even).all()
    assert (split.max_load >= pieces.max_load * (1 - 1e-9)).all(), "no split of any placement beats the replica-limited bound"


def test_a_hot_expert_with_few_slots_is_what_limits() -> None:
    loads = np.array([[80.0, 5.0, 5.0, 10.0]])
    bound = replica_bound(loads, num_slots=5, num_gpus=5)
    np.testing.assert_allclose(bound.max_load, [40.0])
    np.testing.assert_allclose(bound.balancedness, [0.5])
    np.testing.assert_allclose(mean_bound(loads, 5).max_load, [20.0])


def test_unusable_sizes_are_named() -> None:
    location = ExpertLocation.trivial(num_layers=2, num_experts=4, num_slots=4, ep_size=2)
    with pytest.raises(ValueError, match=r"2 layers, 4 experts.*\[2, 5\]"):
        optimal_split(location, np.zeros((2, 5)))
    with pytest.raises(ValueError, match="3 slots are too few for 4 experts"):
        replica_bound(np.zeros((2, 4)), 3, 3)
