"""How one batch's tokens are split over the replicas of their experts so that the busiest GPU has the least to do.

Knows counts and one layer's slots, in integers only: every rank that has the same counts gets the same split, on any machine.
The split is a transport problem (experts -> GPUs). Its exact integer optimum is found by augmenting paths under a load limit; when
no path leads out of an overloaded set of GPUs, all that set's load is confined to it, so its mean is a proven bound and becomes
the next limit (Newton's method on the parametric flow: Dinkelbach 1967; Gallo, Grigoriadis, Tarjan 1989). The same search with one
unit per activated expert evens out activated experts (a semi-matching: Harvey, Ladner, Lovasz, Tamir 2006).

Glossary of location.py. An expert is *fixed* in a layer when all its replicas lie on one GPU, else *shared*. Of several replicas
on one GPU only the first is used: a second one would make the GPU read the same weights twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from moesaic.eplb.location import ExpertLocation, Int64Array


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerReplicas:
    """One layer's slots as the split needs them; build with `of`.

    slots int64 [R]: the expert of each slot; slots_by_expert int64 [R]: the slots ordered by expert, then slot. Of the fixed
    experts: ids, slots, GPUs. Of the S shared ones: ids int64 [S], the GPUs of each, and all their slots in a row; for every GPU
    the hops that tokens can make from it: (index in [0, S) of the expert, the other GPU).
    """

    num_gpus: int
    num_experts: int
    slots: Int64Array
    slots_by_expert: Int64Array
    fixed_experts: Int64Array
    fixed_slots: Int64Array
    fixed_gpus: Int64Array
    shared_experts: Int64Array
    shared_gpus: tuple[tuple[int, ...], ...]
    shared_slots: Int64Array
    hops: tuple[tuple[tuple[int, int], ...], ...]

    @staticmethod
    def of(slots: Int64Array, *, num_experts: int, num_gpus: int) -> LayerReplicas:
        """slots int64 [R]: the expert of each slot, every expert at least once; R is a multiple of `num_gpus`."""
        order = np.argsort(slots, kind="stable").astype(np.int64)
        experts, gpus = slots[order], order // (len(slots) // num_gpus)
        first_on_gpu = np.r_[True, (np.diff(experts) != 0) | (np.diff(gpus) != 0)]
        used, experts, gpus = order[first_on_gpu], experts[first_on_gpu], gpus[first_on_gpu]
        is_shared = np.bincount(experts, minlength=num_experts)[experts] > 1
        shared_experts, shared_index = np.unique(experts[is_shared], return_inverse=True)
        shared_gpus: list[list[int]] = [[] for _ in shared_experts]
        for index, gpu in zip(shared_index.tolist(), gpus[is_shared].tolist(), strict=True):
            shared_gpus[index].append(gpu)
        hops: list[list[tuple[int, int]]] = [[] for _ in range(num_gpus)]
        for index, gpus_of_expert in enumerate(shared_gpus):
            for gpu, other in permutations(gpus_of_expert, 2):
                hops[gpu].append((index, other))
        return LayerReplicas(
            num_gpus=num_gpus,
            num_experts=num_experts,
            slots=slots,
            slots_by_expert=order,
            fixed_experts=experts[~is_shared],
            fixed_slots=used[~is_shared],
            fixed_gpus=gpus[~is_shared],
            shared_experts=shared_experts,
            shared_gpus=tuple(map(tuple, shared_gpus)),
            shared_slots=used[is_shared],
            hops=tuple(map(tuple, hops)),
        )


def balanced_split(counts: Int64Array, layer: LayerReplicas) -> Int64Array:
    """Tokens per expert int64 [E] -> tokens per slot int64 [R]: the most loaded GPU has as few as any split can give it."""
    return _optimal_split(counts, layer, _whole_to_emptiest)


def _optimal_split(counts: Int64Array, layer: LayerReplicas, start: _Start) -> Int64Array:
    fixed = counts[layer.fixed_experts]
    fixed_loads = np.bincount(layer.fixed_gpus, weights=fixed, minlength=layer.num_gpus).astype(np.int64)
    limit = max(_ceil_mean(int(counts.sum()), layer.num_gpus), int(fixed_loads.max()))
    loads, shares = fixed_loads.tolist(), []
    for tokens, gpus in zip(counts[layer.shared_experts].tolist(), layer.shared_gpus, strict=True):
        share = start(tokens, gpus, loads)
        for gpu, num_tokens in share.items():
            loads[gpu] += num_tokens
        shares.append(share)
    _Levelling(layer, loads, shares).run(limit)
    split = np.zeros(len(layer.slots), dtype=np.int64)
    split[layer.fixed_slots] = fixed
    split[layer.shared_slots] = [tokens for share in shares for tokens in share.values()]
    return split


def activated_split(counts: Int64Array, layer: LayerReplicas) -> Int64Array:
    """As balanced_split, but every activated expert goes whole to one slot; the most slots in use on a GPU are as few as can be.

    For decode steps bound by reading weights: a GPU's time goes with the experts that it touches, not with their tokens.
    """
    is_used = balanced_split((counts > 0).astype(np.int64), layer)
    return is_used * counts[layer.slots]


def split_of_source(split: Int64Array, counts: Int64Array, rank: int, layer: LayerReplicas) -> Int64Array:
    """Tokens that source `rank` sends to each slot, int64 [R]: summed over ranks it is `split`; per expert it is the rank's count.

    split int64 [R]: tokens per slot; counts int64 [num_ranks, E]: each rank's tokens per expert. Ranks in their order fill an
    expert's replicas in slot order, so that traffic stays near its source (the monotone coupling).
    """
    order = layer.slots_by_expert
    slot_end = np.cumsum(split[order])
    totals, before = counts.sum(axis=0), counts[:rank].sum(axis=0)
    own_start = (np.cumsum(totals) - totals + before)[layer.slots[order]]
    own_end = own_start + counts[rank][layer.slots[order]]
    overlap = np.minimum(slot_end, own_end) - np.maximum(slot_end - split[order], own_start)
    sent = np.empty_like(split)
    sent[order] = np.maximum(overlap, 0)
    return sent


def planned_weights(location: ExpertLocation, load: NDArray[np.generic]) -> Int64Array:
    """Expected load [L, E], 0 or more -> the weight of every slot int64 [L, R]: its part of a balanced split of that load.

    Of the splits that are best for that load it is one near even shares, so that it also suits a load that has drifted.
    """
    share = load.astype(np.float64) / np.maximum(load.sum(axis=1, keepdims=True, dtype=np.float64), 1e-300)
    weights = np.zeros_like(location.physical_to_logical)
    for layer_index, slots in enumerate(location.physical_to_logical):
        layer = LayerReplicas.of(slots, num_experts=location.num_experts, num_gpus=location.ep_size)
        weights[layer_index] = _optimal_split(np.rint(share[layer_index] * 2**24).astype(np.int64), layer, _evenly)
    return weights


def _ceil_mean(total: int, num: int) -> int:
    return -(-total // num)


_Share = dict[int, int]
"""One shared expert's tokens per GPU."""
_Start = Callable[[int, tuple[int, ...], list[int]], _Share]
"""An expert's tokens, its GPUs and the GPUs' loads so far -> its share before the levelling."""


def _whole_to_emptiest(tokens: int, gpus: tuple[int, ...], loads: list[int]) -> _Share:
    """Leaves the levelling the least to do, and whole experts whole."""
    emptiest = min(gpus, key=loads.__getitem__)
    return {gpu: tokens if gpu == emptiest else 0 for gpu in gpus}


def _evenly(tokens: int, gpus: tuple[int, ...], loads: list[int]) -> _Share:
    """The levelling then departs from even shares no more than it must, so that the split also suits loads that drift."""
    whole, rest = divmod(tokens, len(gpus))
    return {gpu: whole + (index < rest) for index, gpu in enumerate(gpus)}


class _Levelling:
    """Moves shares of experts along paths of GPUs until no GPU is over the limit, raising the limit only where it must."""

    def __init__(self, layer: LayerReplicas, loads: list[int], shares: list[dict[int, int]]) -> None:
        """`loads`: tokens per GPU; `shares` of every shared expert: its tokens per GPU. Both are changed in place."""
        self._loads, self._shares, self._hops = loads, shares, layer.hops

    def run(self, limit: int) -> None:
        loads = self._loads
        for gpu in sorted(range(len(loads)), key=loads.__getitem__, reverse=True):
            while loads[gpu] > limit:
                reached = self._relieve(gpu, limit)
                if loads[gpu] > limit and all(loads[other] >= limit for other in reached):
                    limit = _ceil_mean(sum(loads[other] for other in reached), len(reached))

    def _relieve(self, gpu: int, limit: int) -> list[int]:
        """One breadth-first search from `gpu` along positive shares, moving load to every GPU with room; the GPUs reached."""
        loads, shares = self._loads, self._shares
        via: dict[int, tuple[int, int]] = {gpu: (-1, -1)}  # GPU -> (the GPU before it, the expert that moves between them)
        reached = [gpu]
        for near in reached:
            for expert, far in self._hops[near]:
                if far in via or not shares[expert][near]:
                    continue
                via[far] = (near, expert)
                reached.append(far)
                if loads[far] < limit:
                    self._move(gpu, far, via, limit)
                    if loads[gpu] <= limit:
                        return reached
        return reached

    def _move(self, source: int, target: int, via: dict[int, tuple[int, int]], limit: int) -> None:
        """Shift what the path from `source` to `target` can carry: at most the excess of one and the room of the other."""
        amount = min(self._loads[source] - limit, limit - self._loads[target])
        path = []
        gpu = target
        while gpu != source:
            before, expert = via[gpu]
            shares = self._shares[expert]
            if shares[before] < amount:
                amount = shares[before]
                if not amount:
                    return  # an earlier move of this search has used the path up
            path.append((shares, before, gpu))
            gpu = before
        for shares, before, after in path:
            shares[before] -= amount
            shares[after] += amount
        self._loads[source] -= amount
        self._loads[target] += amount
