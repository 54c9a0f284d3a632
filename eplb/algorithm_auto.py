"""Our placement: close to the bound, few moves from the placement before, expert groups kept near each other. All layers at once.

A fresh solve has three steps.
1. Replicas: the expert with the largest load per replica gets the next slot (optimal for the largest piece), never more than G.
2. Rounds: pieces sorted by weight; each round deals the next G of them to the G GPUs, the heaviest to the least loaded. Where group
   limited routing profits (several nodes, groups that divide among them), every group has a home node and a round deals pieces at
   home first: pieces of one round weigh about the same, so balance costs little locality.
3. Level: swaps between heavy and light GPUs, then between the heaviest GPU and any other (packing.py).

With a previous placement, it is kept where its largest GPU load is within `tolerance` of the fresh one; else some replicas go to
other experts and some slots are swapped until it is. A layer for which that fails takes the fresh placement, with GPUs renamed so
that as much as can be stays where it is.

    L layers, E experts, R slots on G GPUs with k slots each
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic.eplb.algorithm_deepseek import pack_evenly, replicate_experts
from moesaic.eplb.algorithm_follow import count_replicas, follow
from moesaic.eplb.expert_loads import ExpertLoads
from moesaic.eplb.location import Int64Array
from moesaic.eplb.packing import Packing, level_loads, lower_heaviest, part_replicas

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_LEVELLING = ((1.006, 8, 8), (1.0005, 6, 6))
"""Passes of paired swaps: the GPU load to reach, as a multiple of its floor, rounds, and pairs per round. First the outliers."""
_LAST_AIM, _LAST_ROUNDS = 1.0008, 2
"""The thorough pass on the heaviest GPU of each layer that is still above its floor."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the slots are dealt to. `num_nodes` is 1 unless groups have home nodes: then num_groups is a multiple of it."""

    num_slots: int
    num_gpus: int
    num_groups: int = 1
    num_nodes: int = 1

    @property
    def slots_per_gpu(self) -> int:
        return self.num_slots // self.num_gpus


def place_automatically(
    loads: ExpertLoads, shape: Shape, *, previous: Int64Array | None = None, tolerance: float = 0.01
) -> Int64Array:
    """Loads of L layers and the placement before [L, R], if any -> placement int64 [L, R].

    A layer whose experts all have the same load, or none, gets the trivial placement: there is nothing to act on.
    """
    num_layers, num_experts = loads.mean.shape
    packing = _solve(loads, shape)
    uniform = np.flatnonzero(loads.is_uniform())
    if len(uniform):
        row = np.arange(shape.num_slots) % num_experts
        trivial = np.tile(row, (len(uniform), 1)).reshape(-1, shape.num_gpus, shape.slots_per_gpu)
        pieces = loads.take(uniform).of_replica(count_replicas(trivial, num_experts), shape.num_gpus)
        packing.replace(uniform, Packing.of(trivial, pieces), where=np.ones(len(uniform), dtype=bool))
    if previous is None:
        return packing.experts.reshape(num_layers, shape.num_slots)
    followed = follow(previous.reshape(packing.experts.shape), packing, loads, shape.num_nodes, tolerance)
    return followed.reshape(num_layers, shape.num_slots)


def _solve(loads: ExpertLoads, shape: Shape) -> Packing:
    num_layers, num_experts = loads.mean.shape
    can_part = shape.slots_per_gpu <= num_experts
    _, _, count = replicate_experts(loads.cautious, shape.num_slots, shape.num_gpus if can_part else None)
    piece = loads.of_replica(count, shape.num_gpus)
    order = np.argsort(-piece, axis=1)
    experts = np.repeat(order.ravel(), np.take_along_axis(count, order, axis=1).ravel()).reshape(num_layers, shape.num_slots)
    pieces = np.take_along_axis(piece, experts, axis=1)
    packing = Packing.of(_deal_in_rounds(experts, pieces, _nodes_at_home(experts, loads.mean, shape), shape), piece)
    if can_part:
        part_replicas(packing)
    floor = np.maximum(pieces.sum(axis=1) / shape.num_gpus, _lightest_with_heaviest(pieces, shape.slots_per_gpu))
    for aim, max_rounds, max_pairs in _LEVELLING:
        level_loads(packing, floor * aim, max_rounds=max_rounds, max_pairs=max_pairs)
    lower_heaviest(packing, floor * _LAST_AIM, max_rounds=_LAST_ROUNDS)
    return packing


def _lightest_with_heaviest(pieces: FloatArray, slots_per_gpu: int) -> FloatArray:
    """The least load, [L], of a GPU that has the heaviest of these pieces [L, R], sorted heaviest first."""
    floor: FloatArray = pieces[:, 0] + pieces[:, pieces.shape[1] - slots_per_gpu + 1 :].sum(axis=1)
    return floor


def _nodes_at_home(experts: Int64Array, load: FloatArray, shape: Shape) -> Int64Array:
    """The node of every slot of the rounds dealt at home, int64 [L, k - 1, G]; experts [L, R] in dealing order.

    A node takes G / nodes pieces in a round: those at home there first, then what other nodes have no room for. The last round,
    of the lightest pieces, isn't among them: it has to make up for the differences.
    """
    num_layers, num_experts = load.shape
    num_gpus, num_nodes, num_rounds = shape.num_gpus, shape.num_nodes, shape.slots_per_gpu - 1
    if num_nodes == 1 or not num_rounds:
        return np.zeros((num_layers, 0, num_gpus), dtype=np.int64)
    group_load = load.reshape(num_layers, shape.num_groups, -1).sum(axis=2)
    home_of_group, _ = pack_evenly(group_load, num_nodes)
    group = experts[:, : num_rounds * num_gpus] // (num_experts // shape.num_groups)
    home = np.take_along_axis(home_of_group, group, axis=1).reshape(-1, num_gpus)
    is_at = home == np.arange(num_nodes)[:, None, None]
    rank = np.where(is_at, is_at.cumsum(axis=2) - 1, 0).sum(axis=0)
    gpus_per_node = num_gpus // num_nodes
    place = np.where(rank < gpus_per_node, home * gpus_per_node + rank, -1)
    is_free = np.ones(home.shape, dtype=bool)
    row, column = np.nonzero(place >= 0)
    is_free[row, place[row, column]] = False
    place[place < 0] = np.nonzero(is_free)[1]
    return (place // gpus_per_node).reshape(num_layers, num_rounds, num_gpus)


def _deal_in_rounds(experts: Int64Array, pieces: FloatArray, node: Int64Array, shape: Shape) -> Int64Array:
    """experts and pieces [L, R], heaviest first, and each slot's node [L, rounds at home, G] -> experts int64 [L, G, k]."""
    num_layers, num_gpus = len(experts), shape.num_gpus
    packed = np.full((num_layers, num_gpus, shape.slots_per_gpu), -1)
    loads = np.zeros((num_layers, num_gpus))
    layers = np.arange(num_layers)[:, None]
    for number in range(shape.slots_per_gpu):
        items = slice(number * num_gpus, (number + 1) * num_gpus)
        dealt, weight, parts = experts[:, items], pieces[:, items], 1
        if number < node.shape[1]:
            by_node = np.argsort(node[:, number], axis=1, kind="stable")
            dealt, weight, parts = dealt[layers, by_node], weight[layers, by_node], shape.num_nodes
        last = experts[:, items.start - 1] if number else np.full(num_layers, -1)
        is_last = dealt == last[:, None]
        has_last = (packed[:, :, :number] == last[:, None, None]).any(axis=2) if is_last.any() else is_last
        gpu = _lightest_first(loads, is_last, has_last, parts)
        packed[layers, gpu, number] = dealt
        loads[layers, gpu] += weight
    return packed


def _lightest_first(loads: FloatArray, is_last: BoolArray, has_last: BoolArray, parts: int) -> Int64Array:
    """For the pieces of a round, heaviest first in each part (node), their GPUs, lightest first: all [L, G].

    Replicas of one expert weigh the same and follow each other; `is_last` marks the pieces whose sisters ended the round before,
    on the GPUs of `has_last`. They come first in their part, and get the lightest GPUs without a sister (if there are enough).
    """
    by_part = (len(loads), parts, -1)
    loads, num_last = loads.reshape(by_part), is_last.reshape(by_part).sum(axis=2, keepdims=True)
    if num_last.any():
        order = np.where(has_last.reshape(by_part), np.inf, loads).argsort(axis=2)
        first = np.empty(loads.shape, dtype=bool)
        np.put_along_axis(first, order, np.arange(loads.shape[2]) < num_last, axis=2)
        loads = np.where(first, -np.inf, loads)
    order = loads.argsort(axis=2) + np.arange(parts)[:, None] * loads.shape[2]
    gpus: Int64Array = order.reshape(is_last.shape)
    return gpus
