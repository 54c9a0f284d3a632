"""From one placement to the next with few moves: keep what is still good, repair a little, else rename the GPUs of a new one.

n layers, G GPUs with k slots each, E experts
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from moesaic.eplb.expert_loads import ExpertLoads
from moesaic.eplb.location import Int64Array
from moesaic.eplb.packing import Packing, level_loads, lower_heaviest, part_replicas

FloatArray = NDArray[np.float64]

_REPAIR_ROUNDS = 24
_HARMLESS_PIECE = 0.5
"""A piece up to this fraction of the mean GPU load needs no more replicas than it has: swaps can balance it."""


def follow(previous: Int64Array, fresh: Packing, loads: ExpertLoads, num_nodes: int, tolerance: float) -> Int64Array:
    """The placement int64 [n, G, k] to go to from `previous` [n, G, k], knowing a fresh solve.

    A layer's largest GPU load is at most 1 + tolerance times the fresh one, and as a rule few slots change to get there. Experts
    that stay on a GPU stay in their slot; swaps inside the `num_nodes` nodes are tried before others.
    """
    _, num_gpus, num_slots = previous.shape
    num_experts = loads.mean.shape[1]
    must_part = num_slots <= num_experts
    count = count_replicas(previous, num_experts)
    limit = fresh.loads.max(axis=1) * (1 + tolerance)
    kept = Packing.of(previous.copy(), loads.of_replica(count, num_gpus))
    if must_part:
        kept.replace(np.arange(len(previous)), fresh, where=count.max(axis=1) > num_gpus)
        part_replicas(kept)
    above = np.flatnonzero(kept.loads.max(axis=1) > limit)
    if len(above):
        largest_piece = np.maximum(fresh.pieces.max(axis=(1, 2)) * (1 + tolerance), fresh.loads.mean(axis=1) * _HARMLESS_PIECE)
        repaired = _repair(kept.experts[above], loads.take(above), limit[above], largest_piece[above], num_nodes)
        kept.replace(above, repaired, where=np.ones(len(above), dtype=bool))
    placed = kept.experts
    failed = np.flatnonzero(kept.loads.max(axis=1) > limit)
    if len(failed):
        placed[failed] = rename_gpus(fresh.experts[failed], previous[failed], num_experts, num_nodes)
    return keep_slots(placed, previous)


def count_replicas(experts: Int64Array, num_experts: int) -> Int64Array:
    """experts [n, ...] in their slots -> replicas of every expert int64 [n, E]."""
    flat = experts.reshape(len(experts), -1)
    keys = flat + np.arange(len(flat))[:, None] * num_experts
    return np.bincount(keys.ravel(), minlength=len(flat) * num_experts).reshape(len(flat), num_experts)


def _repair(experts: Int64Array, loads: ExpertLoads, limit: FloatArray, largest_piece: FloatArray, num_nodes: int) -> Packing:
    """Give replicas of cold experts to hot ones, then swap slots of GPUs above the limit [n]; `experts` is changed."""
    num_gpus = experts.shape[1]
    _shift_replicas(experts, loads, largest_piece)
    packing = Packing.of(experts, loads.of_replica(count_replicas(experts, loads.mean.shape[1]), num_gpus))
    level = partial(level_loads, max_rounds=_REPAIR_ROUNDS, max_pairs=num_gpus)
    if num_nodes > 1:
        level(packing.split(num_nodes), np.repeat(limit, num_nodes), only_finishing=True)
    level(packing, limit, only_finishing=True)
    level(packing, limit)
    lower_heaviest(packing, limit, max_rounds=_REPAIR_ROUNDS)
    return packing


def _shift_replicas(experts: Int64Array, loads: ExpertLoads, largest_piece: FloatArray) -> None:
    """While a piece is above `largest_piece` [n], its expert takes a slot of the expert that then has the smallest pieces.

    The slot is one on a GPU without the hot expert, the most loaded of those. Ends when the other's pieces would be too large.
    """
    num_gpus, num_slots = experts.shape[1:]
    num_experts = loads.mean.shape[1]
    count = count_replicas(experts, num_experts)
    layers = np.arange(len(experts))
    while True:
        piece = loads.take(layers).of_replica(count[layers], num_gpus)
        is_above = piece.max(axis=1) > largest_piece[layers]
        layers, piece = layers[is_above], piece[is_above]
        if not len(layers):
            return
        rows, held, hot = np.arange(len(layers)), experts[layers], piece.argmax(axis=1)
        fewer = count[layers] - 1
        piece_after = np.divide(loads.cautious[layers], fewer, out=np.full_like(piece, np.inf), where=fewer > 0)
        cost = piece_after[rows[:, None, None], held]
        cost[(held == hot[:, None, None]).any(axis=2)] = np.inf
        smallest = cost.min(axis=(1, 2))
        gpu_load = piece[rows[:, None, None], held].sum(axis=2, keepdims=True)
        slot = np.where(cost == smallest[:, None, None], gpu_load, -1.0).reshape(len(layers), -1).argmax(axis=1)
        useful = smallest <= largest_piece[layers]
        layers, hot, slot = layers[useful], hot[useful], slot[useful]
        gpu, position = np.divmod(slot, num_slots)
        count[layers, experts[layers, gpu, position]] -= 1
        count[layers, hot] += 1
        experts[layers, gpu, position] = hot


def rename_gpus(experts: Int64Array, previous: Int64Array, num_experts: int, num_nodes: int) -> Int64Array:
    """The same packing [n, G, k] with nodes, and GPUs inside nodes, ordered to leave many experts where `previous` has them."""
    num_layers, num_gpus, num_slots = experts.shape
    by_node = (num_layers, num_nodes, -1)
    if num_nodes > 1:
        order = _match(_overlap(experts.reshape(by_node), previous.reshape(by_node), num_experts))
        experts = np.take_along_axis(experts.reshape(by_node), order[:, :, None], axis=1)
    per_node = (num_layers * num_nodes, num_gpus // num_nodes, num_slots)
    experts, previous = experts.reshape(per_node), previous.reshape(per_node)
    order = _match(_overlap(experts, previous, num_experts))
    return np.take_along_axis(experts, order[:, :, None], axis=1).reshape(num_layers, num_gpus, num_slots)


def _overlap(experts: Int64Array, previous: Int64Array, num_experts: int) -> NDArray[np.float32]:
    """How many experts each place of `previous` [n, P, k] shares with each of `experts` [n, P, k]: [n, P of previous, P]."""
    present = np.zeros((2, len(experts), experts.shape[1], num_experts), dtype=np.float32)
    for side, held in zip(present, (previous, experts), strict=True):
        np.put_along_axis(side, held, 1.0, axis=2)
    shared: NDArray[np.float32] = present[0] @ present[1].transpose(0, 2, 1)
    return shared


def _match(overlap: NDArray[np.float32]) -> Int64Array:
    """For every row of overlap [n, P, P] a column of its own, int64 [n, P]: rows with the best choice choose first."""
    num_problems, num_places, _ = overlap.shape
    rows = np.arange(num_problems)
    chosen = np.empty((num_problems, num_places), dtype=np.int64)
    for place in np.argsort(-overlap.max(axis=2), axis=1, kind="stable").T:
        column = overlap[rows, place].argmax(axis=1)
        chosen[rows, place] = column
        overlap[rows, :, column] = -1
    return chosen


def keep_slots(experts: Int64Array, previous: Int64Array) -> Int64Array:
    """The same experts on every GPU, [n, G, k], those that `previous` has on that GPU in their old slots."""
    shape, num_slots = experts.shape, experts.shape[2]
    now, before = experts.reshape(-1, num_slots), previous.reshape(-1, num_slots)
    changed = np.flatnonzero((now != before).any(axis=1))
    now, before = now[changed], before[changed]
    gpus = np.arange(len(changed))
    slot_of = np.full(now.shape, -1)
    is_free = np.ones(now.shape, dtype=bool)
    for slot in range(num_slots):
        matches = (before == now[:, slot, None]) & is_free
        stays, old = matches.any(axis=1), matches.argmax(axis=1)
        slot_of[stays, slot] = old[stays]
        is_free[gpus[stays], old[stays]] = False
    slot_of[slot_of < 0] = np.nonzero(is_free)[1]
    kept = experts.reshape(-1, num_slots).copy()
    kept[changed[:, None], slot_of] = now
    return kept.reshape(shape)
