"""How evenly the GPUs of a placement are loaded: our definition and those of three other projects, on plain arrays.

Ours is mean over GPUs / max over GPUs, per sparse layer: the share of the experts' time in which the average GPU works, the
slowest one setting the time. 1.0 is perfect; 1 / ep_size is one GPU doing everything. What to average over layers and time is the
caller's choice, to be named beside the figure. The peers' figures differ from it and from each other on the same loads, so they
are kept apart by name, for comparing with figures that they published.

    L sparse layers, E logical experts, G GPUs (= ep_size); leading axes, such as windows, are free.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.eplb.location import ExpertLocation

FloatArray = NDArray[np.float64]

_SGLANG_EPSILON = 1e-5


def gpu_loads(location: ExpertLocation, counts: ArrayLike) -> FloatArray:
    """Tokens per GPU when every expert's tokens are split evenly over its replicas: counts [..., L, E] -> float64 [..., L, G].

    Raises ValueError when `counts` is not of this placement's layers and experts.
    """
    loads = np.asarray(counts, dtype=np.float64)
    expected = (location.num_layers, location.num_experts)
    if loads.shape[-2:] != expected:
        raise ValueError(f"counts must be [..., {expected[0]} layers, {expected[1]} experts], got shape {list(loads.shape)}")
    layers = np.arange(location.num_layers)[:, None]
    per_slot = (loads / location.logical_count)[..., layers, location.physical_to_logical]
    per_gpu: FloatArray = per_slot.reshape(*loads.shape[:-1], location.ep_size, location.slots_per_gpu).sum(axis=-1)
    return per_gpu


def balancedness(loads: ArrayLike) -> FloatArray:
    """Mean / max over GPUs: loads [..., L, G] -> float64 [..., L]. A layer without any load is in balance: 1.0."""
    mean, largest = _mean_and_max(loads)
    return np.divide(mean, largest, out=np.ones_like(mean), where=largest > 0)


def sglang_balancedness(loads: ArrayLike, *, num_hidden_layers: int) -> FloatArray:
    """SGLang's "current_pass_balancedness" (its utilization rate): loads [..., L, G] of the sparse layers -> float64 [...].

    The plain mean over all `num_hidden_layers` of (mean + 1e-5) / (max + 1e-5). Its counts have a row for every layer of the model;
    a dense layer's is zero and so counts as 1.0, which lifts the figure: 58 sparse layers at 0.50 and 3 dense ones read 0.52.
    """
    mean, largest = _mean_and_max(loads)
    num_sparse = mean.shape[-1]
    if num_hidden_layers < num_sparse:
        raise ValueError(f"num_hidden_layers is {num_hidden_layers}, but there are loads of {num_sparse} sparse layers")
    utilisation = (mean + _SGLANG_EPSILON) / (largest + _SGLANG_EPSILON)
    average: FloatArray = (utilisation.sum(axis=-1) + (num_hidden_layers - num_sparse)) / num_hidden_layers
    return average


def vllm_balancedness(loads: ArrayLike) -> FloatArray:
    """vLLM's logged "balancedness": loads [..., L, G] -> float64 [...].

    (Sum over sparse layers of the mean over GPUs) / (sum over sparse layers of the max over GPUs): layers weigh by their load. 0.0
    without any load. This is the definition that its comments state; versions that gather loads as [layers, GPUs] take mean and
    max over the layers axis, and the figures which those print are not comparable with any other.
    """
    mean, largest = _mean_and_max(loads)
    total: FloatArray = np.asarray(mean.sum(axis=-1))
    slowest: FloatArray = np.asarray(largest.sum(axis=-1))
    return np.divide(total, slowest, out=np.zeros_like(total), where=slowest > 0)


def tensorrt_llm_imbalance(loads: ArrayLike) -> FloatArray:
    """TensorRT-LLM's imbalance ratio: (max - mean) / mean over GPUs, loads [..., L, G] -> float64 [..., L].

    0.0 is perfect and so is a layer without load; it is 1 / balancedness - 1. Its published 1.564 without EPLB and 0.109 with 288
    slots (R1, EP32) are balancednesses of .390 and .902.
    """
    return 1.0 / balancedness(loads) - 1.0


def _mean_and_max(loads: ArrayLike) -> tuple[FloatArray, FloatArray]:
    per_gpu = np.asarray(loads, dtype=np.float64)
    if per_gpu.ndim < 2 or per_gpu.shape[-1] == 0:
        raise ValueError(f"loads must be [..., layers, GPUs] with at least one GPU, got shape {list(per_gpu.shape)}")
    largest: FloatArray = per_gpu.max(axis=-1)
    mean: FloatArray = np.minimum(per_gpu.mean(axis=-1), largest)  # equal loads may average to a bit more than each
    return mean, largest
