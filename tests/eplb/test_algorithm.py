"""Placements are whole, balanced and stable; DeepSeek's policies give what DeepSeek's EPLB gives; bad input is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesaic.eplb import rebalance_experts
from moesaic.eplb.algorithm import ALGORITHMS, place_experts
from moesaic.eplb.balancedness import balancedness, gpu_loads
from moesaic.eplb.location import ExpertLocation

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

README_WEIGHT = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)
"""The worked example of DeepSeek's EPLB: 12 experts in 4 groups, 16 slots on 8 GPUs of 2 nodes."""
README_RESULT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def solve(weight: Any, num_slots: int, num_gpus: int, num_groups: int = 1, num_nodes: int = 1, **kwargs: Any) -> Ints:
    placed: Ints = rebalance_experts(weight, num_slots, num_groups, num_nodes, num_gpus, **kwargs)[0].numpy()
    return placed


def balance(placed: Ints, weight: Floats, num_gpus: int) -> Floats:
    location = ExpertLocation(physical_to_logical=placed, num_experts=weight.shape[1], ep_size=num_gpus)
    return balancedness(gpu_loads(location, weight))


def num_doubled(placed: Ints, num_gpus: int) -> int:
    """Slots that hold an expert which another slot of the same GPU holds."""
    on_gpu = np.sort(placed.reshape(len(placed), num_gpus, -1), axis=2)
    return int((on_gpu[:, :, 1:] == on_gpu[:, :, :-1]).sum())


def loads_like(name: str, num_layers: int = 12, num_experts: int = 256, seed: int = 0) -> Floats:
    """The load cases of benchmarks/bench_eplb.py."""
    rng = np.random.default_rng(seed)
    if name == "zipf":
        return np.stack([rng.permutation(1 / np.arange(1, num_experts + 1)) for _ in range(num_layers)])
    loads = rng.lognormal(0, 1, (num_layers, num_experts))
    if name == "one hot":
        loads[:, 7] = 0
        loads[:, 7] = loads.sum(axis=1) / 4
    return loads


@st.composite
def cases(draw: st.DrawFn) -> tuple[Floats, int, int, int, int]:
    """Loads [L, E] with zeros, ties and heavy tails; slots, GPUs, groups and nodes that fit them."""
    num_nodes = draw(st.sampled_from([1, 1, 2, 3]))
    num_gpus = num_nodes * draw(st.integers(1, 6))
    num_slots = num_gpus * draw(st.integers(1, 7))
    groups = num_nodes * draw(st.sampled_from([1, 2]))
    max_group = num_slots // groups
    num_experts = groups * draw(st.integers(1, max_group)) if max_group else draw(st.integers(1, num_slots))
    num_groups = groups if max_group else 1
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    loads = rng.lognormal(0, draw(st.sampled_from([0.0, 0.3, 1.5, 4.0])), (draw(st.integers(1, 4)), num_experts))
    loads *= rng.random(loads.shape) < draw(st.sampled_from([0.3, 1.0]))
    return loads, num_slots, num_gpus, num_groups, num_nodes


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(ALGORITHMS))
def test_every_placement_is_whole(case: tuple[Floats, int, int, int, int], algorithm: str) -> None:
    loads, num_slots, num_gpus, num_groups, num_nodes = case
    if algorithm == "deepseek_hierarchical" and num_groups % num_nodes:
        return
    placed, slots, count = rebalance_experts(loads, num_slots, num_groups, num_nodes, num_gpus, algorithm=algorithm)
    num_layers, num_experts = loads.shape
    assert placed.dtype == slots.dtype == count.dtype == torch.int64
    assert placed.shape == (num_layers, num_slots)
    assert slots.shape == (num_layers, num_experts, int(count.max()))
    for layer in range(num_layers):
        for expert in range(num_experts):
            listed = slots[layer, expert]
            number = int(count[layer, expert])
            assert number >= 1
            assert (listed[number:] == -1).all()
            assert sorted(listed[:number].tolist()) == torch.nonzero(placed[layer] == expert).flatten().tolist()


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_gpu_has_an_expert_twice_when_that_can_be_avoided(case: tuple[Floats, int, int, int, int]) -> None:
    loads, num_slots, num_gpus, num_groups, num_nodes = case
    placed = solve(loads, num_slots, num_gpus, num_groups, num_nodes)
    if num_slots // num_gpus <= loads.shape[1]:
        assert num_doubled(placed, num_gpus) == 0


@settings(max_examples=100, deadline=None)
@given(cases(), st.booleans())
def test_solving_again_from_the_result_moves_nothing(case: tuple[Floats, int, int, int, int], by_windows: bool) -> None:
    loads, num_slots, num_gpus, num_groups, num_nodes = case
    weight = np.stack([loads, loads * 1.5, loads[:, ::-1]]) if by_windows else loads
    placed = solve(weight, num_slots, num_gpus, num_groups, num_nodes)
    for tolerance in (0.0, 0.01):
        again = solve(weight, num_slots, num_gpus, num_groups, num_nodes, previous=placed, tolerance=tolerance)
        np.testing.assert_array_equal(again, placed)


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 2**32))
def test_from_any_placement_the_result_is_whole_and_within_the_tolerance(
    case: tuple[Floats, int, int, int, int], seed: int
) -> None:
    loads, num_slots, num_gpus, num_groups, num_nodes = case
    rng = np.random.default_rng(seed)
    num_experts = loads.shape[1]
    row = np.concatenate([np.arange(num_experts), rng.integers(0, num_experts, num_slots - num_experts)])
    previous = np.stack([rng.permutation(row) for _ in loads])
    placed = solve(loads, num_slots, num_gpus, num_groups, num_nodes, previous=previous, tolerance=0.05)
    fresh = balance(solve(loads, num_slots, num_gpus, num_groups, num_nodes), loads, num_gpus)
    assert (balance(placed, loads, num_gpus) >= fresh / 1.05 - 1e-9).all()
    if num_slots // num_gpus <= num_experts:
        assert num_doubled(placed, num_gpus) == 0


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2**32))
def test_experts_that_stay_on_a_gpu_stay_in_their_slot(case: tuple[Floats, int, int, int, int], seed: int) -> None:
    loads, num_slots, num_gpus, num_groups, num_nodes = case
    if num_slots // num_gpus > loads.shape[1]:
        return
    previous = solve(loads, num_slots, num_gpus, num_groups, num_nodes)
    moved_loads = loads * np.random.default_rng(seed).lognormal(0, 1, loads.shape)
    placed = solve(moved_loads, num_slots, num_gpus, num_groups, num_nodes, previous=previous)
    shape = (len(loads), num_gpus, -1)
    for before, after in zip(previous.reshape(shape), placed.reshape(shape), strict=True):
        for old, new in zip(before.tolist(), after.tolist(), strict=True):
            assert all(new[old.index(expert)] == expert for expert in set(old) & set(new))


@pytest.mark.parametrize(("num_groups", "num_nodes"), [(1, 1), (8, 4)])
@pytest.mark.parametrize(("name", "num_slots", "num_gpus"), [("lognormal", 288, 32), ("zipf", 288, 32), ("one hot", 288, 32)])
def test_no_layer_is_worse_balanced_than_by_the_global_greedy_method(
    name: str, num_slots: int, num_gpus: int, num_groups: int, num_nodes: int
) -> None:
    loads = loads_like(name)
    ours = balance(solve(loads, num_slots, num_gpus, num_groups, num_nodes), loads, num_gpus)
    greedy = balance(solve(loads, num_slots, num_gpus, algorithm="deepseek"), loads, num_gpus)
    assert (ours >= greedy).all()
    assert ours.mean() > 0.998


def test_many_gpus_with_few_slots_are_balanced_as_well_as_replicas_allow() -> None:
    loads = loads_like("lognormal")
    for num_slots, num_gpus in ((320, 64), (288, 144), (256, 256)):
        ours = balance(solve(loads, num_slots, num_gpus), loads, num_gpus)
        assert (ours >= balance(solve(loads, num_slots, num_gpus, algorithm="deepseek"), loads, num_gpus) - 1e-12).all()


@pytest.mark.parametrize(("num_slots", "num_gpus"), [(288, 32), (288, 144), (320, 64)])
def test_little_noise_moves_few_slots(num_slots: int, num_gpus: int) -> None:
    loads = loads_like("lognormal", num_layers=24)
    noisy = loads * (1 + 0.02 * np.random.default_rng(1).standard_normal(loads.shape))
    before = solve(loads, num_slots, num_gpus)
    after = solve(noisy, num_slots, num_gpus, previous=before)
    fresh = solve(noisy, num_slots, num_gpus)
    assert (before != after).mean() <= 0.05
    assert (balance(after, noisy, num_gpus) >= balance(fresh, noisy, num_gpus) * 0.99).all()
    assert (before != fresh).mean() > 0.5, "without the previous placement most slots would have moved"


def test_groups_are_kept_near_one_node() -> None:
    loads = loads_like("lognormal")

    def share_at_home(placed: Ints) -> float:
        """Share of the slots that lie in the node where most of their group is."""
        groups = placed.reshape(len(placed), 4, 72) // 32
        per_node = np.stack([(groups == group).sum(axis=2) for group in range(8)])
        return float(per_node.max(axis=2).sum() / placed.size)

    aware, unaware = solve(loads, 288, 32, 8, 4), solve(loads, 288, 32)
    assert share_at_home(aware) > 0.6
    assert share_at_home(unaware) < 0.4


def test_volatile_experts_are_placed_with_their_variance_in_mind() -> None:
    """Half of the experts vary from window to window. Knowing which, the placement holds better in windows it has not seen."""
    rng = np.random.default_rng(3)
    mean = rng.lognormal(0, 0.7, (8, 64))
    volatile = rng.random(mean.shape) < 0.3
    windows = mean * rng.lognormal(-0.5, 1.0, (400, *mean.shape)) ** volatile
    seen, unseen = windows[:200], windows[200:]
    by_mean = solve(seen.sum(axis=0), 72, 12)
    by_windows = solve(seen, 72, 12)
    assert out_of_sample(by_windows, unseen) > out_of_sample(by_mean, unseen)


def out_of_sample(placed: Ints, windows: Floats) -> float:
    location = ExpertLocation(physical_to_logical=placed, num_experts=windows.shape[2], ep_size=12)
    return float(balancedness(gpu_loads(location, windows)).mean())


def test_windows_of_different_traffic_but_equal_shares_have_no_variance() -> None:
    loads = loads_like("lognormal", num_layers=3, num_experts=32)
    windows = np.stack([loads, 5 * loads, 0 * loads, 0.1 * loads])
    np.testing.assert_array_equal(solve(windows, 40, 8), solve(windows.sum(axis=0), 40, 8))


def test_deepseek_gives_the_worked_example_of_deepseeks_eplb() -> None:
    placed, slots, count = rebalance_experts(README_WEIGHT, 16, 4, 2, 8, algorithm="deepseek")
    assert placed.tolist() == README_RESULT
    assert count.sum(dim=1).tolist() == [16, 16]
    assert slots.shape == (2, 12, 2)
    hierarchical = rebalance_experts(torch.from_numpy(README_WEIGHT), 16, 4, 2, 8, algorithm="deepseek_hierarchical")
    assert hierarchical[0].tolist() == README_RESULT


def test_deepseek_is_global_when_groups_do_not_divide_among_nodes() -> None:
    loads = loads_like("lognormal", num_layers=2, num_experts=32)
    np.testing.assert_array_equal(
        solve(loads, 36, 12, num_groups=4, num_nodes=3, algorithm="deepseek"), solve(loads, 36, 12, algorithm="deepseek")
    )


def test_tensors_and_arrays_of_any_real_dtype_give_the_same() -> None:
    counts = np.random.default_rng(0).integers(0, 1000, (3, 16))
    expected = solve(counts, 20, 4)
    for weight in (torch.from_numpy(counts), torch.from_numpy(counts).float(), counts.astype(np.float32), counts.tolist()):
        np.testing.assert_array_equal(solve(weight, 20, 4), expected)
    kept = counts.copy()
    solve(counts, 20, 4)
    np.testing.assert_array_equal(counts, kept)


@pytest.mark.parametrize(("load", "num_slots"), [(0, 8), (0, 12), (7, 8), (7, 12)])
def test_equal_or_no_loads_give_the_trivial_placement(load: int, num_slots: int) -> None:
    placed = solve(np.full((3, 8), load), num_slots, 4)
    np.testing.assert_array_equal(placed, np.tile(np.arange(num_slots) % 8, (3, 1)))


def test_a_layer_without_load_does_not_disturb_the_others() -> None:
    loads = loads_like("lognormal", num_layers=3, num_experts=16)
    with_zeros = np.insert(loads, 1, 0.0, axis=0)
    np.testing.assert_array_equal(solve(with_zeros, 20, 4)[[0, 2, 3]], solve(loads, 20, 4))


def test_places_to_and_from_an_expert_location() -> None:
    loads = loads_like("lognormal", num_layers=2, num_experts=16)
    trivial = ExpertLocation.trivial(num_layers=2, num_experts=16, num_slots=24, ep_size=8, num_nodes=2)
    location = place_experts(loads, num_slots=24, ep_size=8, num_nodes=2, num_groups=4, previous=trivial)
    assert (location.num_slots, location.ep_size, location.num_nodes) == (24, 8, 2)
    assert (balancedness(gpu_loads(location, loads)) >= balancedness(gpu_loads(trivial, loads))).all()


def spoilt(value: float) -> Floats:
    loads = np.ones((3, 8))
    loads[1, 5] = value
    return loads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((spoilt(np.nan), 8, 1, 1, 4), "expert 5 of sparse layer 1 is nan"),
        ((spoilt(-1), 8, 1, 1, 4), "expert 5 of sparse layer 1 is -1"),
        ((spoilt(np.inf), 8, 1, 1, 4), "expert 5 of sparse layer 1 is inf"),
        ((spoilt(-1)[None], 8, 1, 1, 4), "expert 5 of sparse layer 1 in window 0 is -1"),
        ((np.ones(8), 8, 1, 1, 4), r"weight must have shape \[layers, experts\].*got \[8\]"),
        ((np.ones((0, 8)), 8, 1, 1, 4), r"got \[0, 8\]"),
        ((np.ones((1, 8), dtype=complex), 8, 1, 1, 4), "real numbers, got dtype complex128"),
        ((np.ones((1, 8)), 7, 1, 1, 7), "num_replicas is 7: too few slots for 8 experts"),
        ((np.ones((1, 8)), 10, 1, 1, 4), "num_replicas 10 is not a multiple of num_gpus 4; the next that is: 12"),
        ((np.ones((1, 8)), 12, 2, 2, 3), "num_gpus 3 is not a multiple of num_nodes 2"),
        ((np.ones((1, 8)), 12, 3, 1, 4), "8 experts can't be split evenly into num_groups 3"),
        ((np.ones((1, 8)), 12, 0, 1, 4), "num_groups must be at least 1, got 0"),
    ],
)
def test_unusable_arguments_are_named(arguments: tuple[Any, ...], message: str) -> None:
    for algorithm in ALGORITHMS:
        with pytest.raises(ValueError, match=message):
            rebalance_experts(*arguments, algorithm=algorithm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "greedy"}, "'greedy' is not known; there are auto, deepseek, deepseek_hierarchical"),
        ({"algorithm": "deepseek_hierarchical"}, "num_groups 1 can't be split evenly over num_nodes 2"),
        ({"previous": np.zeros((2, 8), dtype=np.int64)}, r"previous must be .*\[1 layers, 12 slots\].*\[2, 8\]"),
        ({"previous": np.zeros((1, 12), dtype=np.int64)}, "expert 1 of sparse layer 0 has no slot"),
        ({"previous": np.arange(12)[None]}, "slot 8 of sparse layer 0 holds expert 8"),
        ({"tolerance": -0.1}, "tolerance must be .*got -0.1"),
    ],
)
def test_unusable_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rebalance_experts(np.ones((1, 8)), 12, 1, 2, 4, **options)
