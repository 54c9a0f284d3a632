"""Placements, counts, and weights that hold their expert and layer: a look at the slots says whether they are those of the map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moesaic.eplb.balancedness import gpu_loads
from moesaic.eplb.location import ExpertLocation, Int64Array


def make_weights(location: ExpertLocation, rank: int, *, width: int = 6) -> list[list[Tensor]]:
    """Per layer: a matrix stored transposed, one whose columns are spread, an FP8 one, and one scale per expert."""
    layers = []
    per_gpu = location.slots_per_gpu
    for layer in range(location.num_layers):
        matrix = torch.empty(per_gpu, width, 5).transpose(1, 2)
        spread = torch.empty(per_gpu, 3, 2 * width)[..., ::2]
        fp8 = torch.empty(per_gpu, 3, width, dtype=torch.float8_e4m3fn)
        tensors = [matrix, spread, fp8, torch.empty(per_gpu)]
        signature = tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors)
        for local in range(per_gpu):
            expert = int(location.physical_to_logical[layer, rank * per_gpu + local])
            for tensor, value in zip(tensors, expert_weights(layer, expert, signature), strict=True):
                tensor[local] = value
        layers.append(tensors)
    return layers


@lru_cache(maxsize=1000)
def expert_weights(layer: int, expert: int, signature: tuple[tuple[torch.Size, torch.dtype], ...]) -> list[Tensor]:
    """What a slot that holds this expert must hold, in tensors of these shapes and types."""
    values = []
    for index, (shape, dtype) in enumerate(signature):
        ramp = torch.arange(max(1, shape.numel())).view(shape) + 7 * index + 50 * layer + 3 * expert
        values.append((ramp % 251).to(dtype))
    return values


def slots_that_lie(location: ExpertLocation, rank: int, layers: Sequence[Sequence[Tensor]]) -> list[tuple[int, int]]:
    """(layer, slot) of this rank whose weights are not those that the placement says."""
    first = rank * location.slots_per_gpu
    found = []
    for layer, tensors in enumerate(layers):
        signature = tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors)
        for slot in range(first, first + location.slots_per_gpu):
            expected = expert_weights(layer, int(location.physical_to_logical[layer, slot]), signature)
            if not all(torch.equal(tensor[slot - first], value) for tensor, value in zip(tensors, expected, strict=True)):
                found.append((layer, slot))
    return found


def random_location(
    rng: np.random.Generator, *, num_layers: int, num_experts: int, num_slots: int, ep_size: int, num_nodes: int = 1
) -> ExpertLocation:
    """Every expert at least once, the rest at random, shuffled."""
    rows = [
        rng.permutation(np.concatenate([np.arange(num_experts), rng.integers(0, num_experts, num_slots - num_experts)]))
        for _ in range(num_layers)
    ]
    return ExpertLocation(
        physical_to_logical=np.array(rows, dtype=np.int64), num_experts=num_experts, ep_size=ep_size, num_nodes=num_nodes
    )


def make_counts(rank: int, num_layers: int, num_experts: int) -> Int64Array:
    """Tokens per expert that a rank has counted: the higher its number, the more."""
    return np.tile(10 * np.arange(1, num_experts + 1) + rank, (num_layers, 1))


def ladder(
    rng: np.random.Generator, num_steps: int, *, num_layers: int, num_experts: int, num_slots: int, ep_size: int
) -> list[ExpertLocation]:
    """Random placements, each better than the one before in every layer, for the counts of all ranks."""
    counts = sum(make_counts(rank, num_layers, num_experts) for rank in range(ep_size))
    drawn = [
        random_location(rng, num_layers=num_layers, num_experts=num_experts, num_slots=num_slots, ep_size=ep_size)
        for _ in range(40)
    ]
    slots = np.array([location.physical_to_logical for location in drawn])
    busiest = np.array([gpu_loads(location, counts).max(axis=-1) for location in drawn])
    picked = np.argsort(-busiest, axis=0, kind="stable")[np.linspace(0, 39, num_steps).astype(int)]
    layers = np.arange(num_layers)
    assert (np.diff(busiest[picked, layers], axis=0) < 0).all()
    return [ExpertLocation(physical_to_logical=slots[row, layers], num_experts=num_experts, ep_size=ep_size) for row in picked]
