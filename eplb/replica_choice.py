"""Which replica serves each (token, expert) choice: logical top-k ids of one layer -> slots. `--ep-dispatch-algorithm`.

    static       every rank keeps to one replica of each expert: on its GPU, else on its node, else dealt out evenly
    dynamic      a random replica for every choice
    probability  random by weights of the slots, such as batch_split.planned_weights
    balanced     by all ranks' counts of this very batch: the most loaded GPU has as few tokens as any split can give it
    activated    by the same counts, for decode: each activated expert on one replica only, the slots in use evened out over GPUs

Glossary of location.py. Knows one rank; the exchange of counts that the last two need is the caller's. The tables of the first
three have fixed shapes and are written in place, so that a captured graph sees a layer's new placement; they never wait for the
device. The last two work on the CPU: with topk_ids on a device they wait for it (moe/balanced_choice.py has them for a device).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.eplb.batch_split import LayerReplicas, activated_split, balanced_split, split_of_source
from moesaic.eplb.location import BadLocation, ExpertLocation, Int64Array

ALGORITHMS = ("static", "dynamic", "probability", "balanced", "activated")

GatherCounts = Callable[[Tensor], Tensor]
"""This rank's tokens per expert, int64 [E] on the CPU -> those of all ranks, int64 [num_ranks, E] on the CPU. A collective call."""


class ReplicaChoice(Protocol):
    def select(self, layer_index: int, topk_ids: Tensor) -> Tensor:
        """topk_ids int64 [T, K], logical, -1 = none -> slots int64 [T, K] on the same device; -1 stays -1.

        Every rank calls it for every sparse layer in the same order, with T = 0 when it is idle.
        """

    def set_layer(self, layer_index: int, slots: Int64Array) -> None:
        """From the next select on, the layer's slots int64 [R] hold these experts. Raises BadLocation if an expert has no slot."""


def make_replica_choice(
    algorithm: str,
    location: ExpertLocation,
    *,
    rank: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    weights: NDArray[np.generic] | None = None,
    gather_counts: GatherCounts | None = None,
) -> ReplicaChoice:
    """The choice of one of ALGORITHMS for expert rank `rank`; `seed` is the same on all ranks. `device` is where topk_ids live.

    `weights` [L, R] of the slots are needed by probability, `gather_counts` by balanced and activated. Raises ValueError.
    """
    if algorithm == "static":
        return StaticChoice(location, rank=rank, seed=seed, device=device)
    if algorithm == "dynamic":
        return RandomChoice(location, rank=rank, seed=seed, device=device)
    if algorithm == "probability":
        if weights is None:
            raise ValueError("replica choice 'probability' needs the weights of the slots (see batch_split.planned_weights)")
        return RandomChoice(location, rank=rank, seed=seed, device=device, weights=weights)
    if algorithm in {"balanced", "activated"}:
        if gather_counts is None:
            raise ValueError(f"replica choice '{algorithm}' needs gather_counts, which brings all ranks' counts together")
        return BatchChoice(location, rank=rank, gather_counts=gather_counts, by_activated=algorithm == "activated")
    raise ValueError(f"there is no replica choice '{algorithm}'; choose one of {', '.join(ALGORITHMS)}")


def static_slots(location: ExpertLocation, rank: int, seed: int = 0) -> Int64Array:
    """The slot that `rank` uses for every expert, int64 [L, E]: on its own GPU, else on its own node, else anywhere.

    Ranks of a node that hold no replica share the node's evenly, and ranks of nodes without one share all of them evenly (the
    replicas' numbers of such ranks differ by one at most); `seed` says who begins where.
    """
    slots = location.logical_to_physical
    gpu, node = location.gpu_of(slots), location.gpu_of(slots) // location.gpus_per_node
    own_node, place_in_node = divmod(rank, location.gpus_per_node)
    distance = np.where(gpu == rank, 0, np.where(node == own_node, 1, 2))
    distance[slots < 0] = 3
    nearest = distance.min(axis=2, keepdims=True)
    is_candidate = distance == nearest

    holders = _present(location, gpu, location.ep_size)  # [L, E, ep_size]
    node_holds = _present(location, node, location.num_nodes)  # [L, E, num_nodes]
    first_of_node = own_node * location.gpus_per_node
    needy_before_in_node = (~holders[:, :, first_of_node:rank]).sum(axis=2)
    needy_nodes_before = (~node_holds[:, :, :own_node]).sum(axis=2)
    needy_before = needy_nodes_before * location.gpus_per_node + place_in_node
    turn = np.where(nearest[:, :, 0] == 2, needy_before, needy_before_in_node)
    turn += np.random.default_rng(seed).integers(0, location.num_slots, size=location.num_experts)
    wanted = turn % is_candidate.sum(axis=2)
    is_wanted = is_candidate & (np.cumsum(is_candidate, axis=2) - 1 == wanted[:, :, None])
    chosen = np.take_along_axis(slots, is_wanted.argmax(axis=2)[:, :, None], axis=2)
    return chosen[:, :, 0]


def _present(location: ExpertLocation, places: Int64Array, num_places: int) -> NDArray[np.bool_]:
    """places [L, E, replicas], of -1 padded slots -> bool [L, E, num_places]: which places hold a replica of the expert."""
    present = np.zeros((location.num_layers, location.num_experts, num_places), dtype=np.bool_)
    layer, expert, replica = np.nonzero(location.logical_to_physical >= 0)
    present[layer, expert, places[layer, expert, replica]] = True
    return present


class _Shape:
    """The sizes of a placement, which never change, and the check of a layer's new slots."""

    def __init__(self, location: ExpertLocation) -> None:
        self.num_experts, self.num_slots = location.num_experts, location.num_slots
        self.ep_size, self.num_nodes = location.ep_size, location.num_nodes

    def check(self, layer_index: int, slots: Int64Array) -> None:
        if slots.shape != (self.num_slots,):
            raise BadLocation(f"sparse layer {layer_index} has {self.num_slots} slots, got a map of shape {list(slots.shape)}")
        outside = np.flatnonzero((slots < 0) | (slots >= self.num_experts))
        if len(outside):
            slot, expert = int(outside[0]), int(slots[outside[0]])
            there = f"there are {self.num_experts} experts"
            raise BadLocation(f"slot {slot} of sparse layer {layer_index} would hold expert {expert}, but {there}")
        missing = np.flatnonzero(np.bincount(slots, minlength=self.num_experts) == 0)
        if len(missing):
            raise BadLocation(f"expert {int(missing[0])} of sparse layer {layer_index} would have no slot")

    def location(self, slots: Int64Array) -> ExpertLocation:
        """One layer's slots as a placement of their own."""
        return ExpertLocation(
            physical_to_logical=slots[None], num_experts=self.num_experts, ep_size=self.ep_size, num_nodes=self.num_nodes
        )


class StaticChoice:
    """`static`: a table lookup."""

    def __init__(self, location: ExpertLocation, *, rank: int, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self._shape, self._rank, self._seed = _Shape(location), rank, seed
        none = np.full((location.num_layers, 1), -1)  # where id -1 looks, counted from the end
        self._table = torch.from_numpy(np.hstack([static_slots(location, rank, seed), none])).to(device)

    def select(self, layer_index: int, topk_ids: Tensor) -> Tensor:
        return self._table[layer_index][topk_ids]

    def set_layer(self, layer_index: int, slots: Int64Array) -> None:
        self._shape.check(layer_index, slots)
        row = static_slots(self._shape.location(slots), self._rank, self._seed)[0]
        self._table[layer_index, :-1].copy_(torch.from_numpy(row))


class RandomChoice:
    """`dynamic` and `probability`: expert e owns [e, e + 1), cut in proportion to its slots' weights; a dart hits one piece.

    It has its own random generator, on its device, so the global one is undisturbed; a graph capture must register `generator`.
    """

    def __init__(
        self,
        location: ExpertLocation,
        *,
        rank: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        weights: NDArray[np.generic] | None = None,
    ) -> None:
        """`weights` [L, R] of the slots, finite and not negative, by default equal; so are those of an expert with only zeros."""
        self._shape = _Shape(location)
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(seed * 1_000_003 + rank)
        shape = (location.num_layers, location.num_slots)
        if weights is not None and weights.shape != shape:
            raise ValueError(f"weights of the slots must have shape {list(shape)}, got {list(weights.shape)}")
        self._slots = torch.zeros(shape, dtype=torch.int64, device=device)
        self._piece_end = torch.zeros(shape, dtype=torch.float64, device=device)
        for layer_index, slots in enumerate(location.physical_to_logical):
            self.set_layer(layer_index, slots, None if weights is None else weights[layer_index])

    def select(self, layer_index: int, topk_ids: Tensor) -> Tensor:
        # float32 has 24 random bits: in float64 the sum with an expert's number is exact, so it never reaches the next expert.
        dart = torch.rand(topk_ids.shape, generator=self.generator, dtype=torch.float32, device=topk_ids.device)
        piece = torch.searchsorted(self._piece_end[layer_index], topk_ids + dart.double(), right=True)
        return torch.where(topk_ids < 0, -1, self._slots[layer_index][piece])

    def set_layer(self, layer_index: int, slots: Int64Array, weights: NDArray[np.generic] | None = None) -> None:
        """`weights` [R] of the layer's new slots; without them its replicas are equal."""
        self._shape.check(layer_index, slots)
        order = np.argsort(slots, kind="stable")
        weight = np.ones(len(slots)) if weights is None else self._checked_weights(layer_index, weights)
        self._slots[layer_index].copy_(torch.from_numpy(order.astype(np.int64)))
        self._piece_end[layer_index].copy_(torch.from_numpy(_piece_ends(slots[order], weight[order], self._shape.num_experts)))

    def _checked_weights(self, layer_index: int, weights: NDArray[np.generic]) -> NDArray[np.float64]:
        weight = weights.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(weight) | (weight < 0))
        if len(bad):
            value = weight[bad[0]]
            raise ValueError(
                f"slot {int(bad[0])} of sparse layer {layer_index} has weight {value}; give finite weights of 0 or more"
            )
        return weight


def _piece_ends(experts: Int64Array, weight: NDArray[np.float64], num_experts: int) -> NDArray[np.float64]:
    """Where each slot's piece ends, float64 [R]: experts ascending, weight of each slot. Cut at the 24 bits of a dart."""
    total = np.bincount(experts, weights=weight, minlength=num_experts)
    share = np.where(total[experts] > 0, weight / np.maximum(total, np.finfo(np.float64).tiny)[experts], 1.0)
    share_total = np.bincount(experts, weights=share, minlength=num_experts)
    within = np.cumsum(share) - (np.cumsum(share_total) - share_total)[experts]
    ends: NDArray[np.float64] = experts + np.rint(within / share_total[experts] * 2**24) / 2**24
    return ends


class BatchChoice:
    """`balanced` and `activated`: all ranks compute the same split of the batch; each assigns its own tokens by its part of it."""

    def __init__(self, location: ExpertLocation, *, rank: int, gather_counts: GatherCounts, by_activated: bool = False) -> None:
        self._shape, self._rank, self._gather_counts = _Shape(location), rank, gather_counts
        self._split = activated_split if by_activated else balanced_split
        self._id_dtype = np.int16 if location.num_experts < 2**15 else np.int64  # numpy sorts int16 by radix
        self._layers = [self._layer(slots) for slots in location.physical_to_logical]

    def select(self, layer_index: int, topk_ids: Tensor) -> Tensor:
        layer = self._layers[layer_index]
        ids = topk_ids.cpu().numpy().ravel()
        num_of_id = np.bincount(ids + 1, minlength=layer.num_experts + 1)
        counts = self._gather_counts(torch.from_numpy(num_of_id[1:])).numpy()
        assert np.array_equal(counts[self._rank], num_of_id[1:]), f"gather_counts changed the counts of rank {self._rank}"
        sent = split_of_source(self._split(counts.sum(axis=0), layer), counts, self._rank, layer)
        slots = np.full(len(ids), -1, dtype=np.int64)
        by_expert = np.argsort(ids.astype(self._id_dtype), kind="stable")
        slots[by_expert[num_of_id[0] :]] = np.repeat(layer.slots_by_expert, sent[layer.slots_by_expert])
        return torch.from_numpy(slots).view(topk_ids.shape).to(topk_ids.device)

    def set_layer(self, layer_index: int, slots: Int64Array) -> None:
        self._shape.check(layer_index, slots)
        self._layers[layer_index] = self._layer(slots)

    def _layer(self, slots: Int64Array) -> LayerReplicas:
        return LayerReplicas.of(slots, num_experts=self._shape.num_experts, num_gpus=self._shape.ep_size)
