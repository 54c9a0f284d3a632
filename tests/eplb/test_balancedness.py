"""Balancedness is what its definition says, ours and the peers', on loads small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.eplb.balancedness import balancedness, gpu_loads, sglang_balancedness, tensorrt_llm_imbalance, vllm_balancedness
from moesaic.eplb.location import ExpertLocation

LOADS = np.array([[4.0, 2.0], [30.0, 10.0]])
"""Two sparse layers on two GPUs: 3 / 4 and 20 / 30 balanced."""


def location() -> ExpertLocation:
    """Layer 0: expert 0 twice on GPU 0, and on GPU 1; layer 1: expert 2 on both."""
    slots = np.array([[0, 0, 1, 0, 2, 2], [0, 1, 2, 2, 2, 0]])
    return ExpertLocation(physical_to_logical=slots, num_experts=3, ep_size=2)


def test_an_experts_load_is_split_evenly_over_its_replicas() -> None:
    counts = np.array([[30, 7, 4], [10, 1, 6]])
    np.testing.assert_allclose(gpu_loads(location(), counts), [[27, 14], [5 + 1 + 2, 2 + 2 + 5]])


def test_leading_axes_are_kept_and_loads_of_windows_add_up() -> None:
    counts = np.random.default_rng(0).integers(0, 100, (5, 4, 2, 3))
    loads = gpu_loads(location(), counts)
    assert loads.shape == (5, 4, 2, 2)
    np.testing.assert_allclose(loads.sum(axis=(0, 1)), gpu_loads(location(), counts.sum(axis=(0, 1))))
    np.testing.assert_allclose(loads.sum(axis=-1), counts.sum(axis=-1))


def test_counts_of_another_model_are_refused_by_shape() -> None:
    with pytest.raises(ValueError, match=r"2 layers, 3 experts.*\[2, 4\]"):
        gpu_loads(location(), np.zeros((2, 4)))


def test_balancedness_is_mean_over_max_and_one_without_load() -> None:
    np.testing.assert_allclose(balancedness(LOADS), [0.75, 2 / 3])
    np.testing.assert_array_equal(balancedness(np.zeros((3, 2, 4))), np.ones((3, 2)))


def test_balancedness_never_exceeds_one_by_rounding() -> None:
    assert balancedness(np.full((1, 7), 0.1)).max() <= 1.0


def test_sglang_averages_over_all_layers_with_dense_ones_perfect() -> None:
    assert sglang_balancedness(LOADS, num_hidden_layers=4) == pytest.approx((0.75 + 2 / 3 + 1 + 1) / 4, abs=1e-5)
    half = np.tile([1.0, 0.0], (58, 1))
    assert sglang_balancedness(half, num_hidden_layers=61) == pytest.approx(0.5246, abs=1e-4)


def test_sglang_refuses_fewer_hidden_layers_than_sparse_ones() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers is 1, but there are loads of 2 sparse layers"):
        sglang_balancedness(LOADS, num_hidden_layers=1)


def test_vllm_divides_sums_over_layers_so_heavy_layers_weigh_more() -> None:
    assert vllm_balancedness(LOADS) == pytest.approx(23 / 34)
    assert vllm_balancedness(np.zeros((2, 2))) == 0.0
    np.testing.assert_allclose(vllm_balancedness(np.stack([LOADS, LOADS * 2])), [23 / 34, 23 / 34])


def test_tensorrt_llm_imbalance_is_the_excess_of_the_largest_over_the_mean() -> None:
    np.testing.assert_allclose(tensorrt_llm_imbalance(LOADS), [1 / 3, 0.5])
    np.testing.assert_array_equal(tensorrt_llm_imbalance(np.zeros((1, 4))), [0.0])


def test_the_four_definitions_differ_on_the_same_loads() -> None:
    ours = float(balancedness(LOADS).mean())
    theirs = [float(sglang_balancedness(LOADS, num_hidden_layers=3)), float(vllm_balancedness(LOADS))]
    assert len({round(value, 3) for value in [ours, *theirs, float(tensorrt_llm_imbalance(LOADS).mean())]}) == 4
