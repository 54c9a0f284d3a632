"""Which expert lies in which slot: one immutable value for all sparse layers, and its two inverse maps.

Glossary. A *logical* expert is one of the model's E experts of a layer. A *slot* (physical expert) is a place for one expert's
weights; R = E + redundant slots, dealt to the GPUs in equal contiguous runs: slot s lies on GPU s // (R / ep_size). A *replica* is
a slot seen from its logical expert: every expert has one or more. GPU means expert rank (one process, one device, or one CPU rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


class BadLocation(ValueError):  # noqa: N818 - reads as what is wrong
    """A placement that cannot be served: names the layer, slot or expert."""


@dataclass(frozen=True, kw_only=True)
class ExpertLocation:
    """physical_to_logical int64 [L, R]: the logical expert of every slot of every sparse layer; not to be written to.

    `ep_size` GPUs share the R slots evenly; `num_nodes` nodes share the GPUs evenly. Raises BadLocation when a size doesn't divide,
    an id is not in [0, num_experts), or an expert has no slot.
    """

    physical_to_logical: Int64Array
    num_experts: int
    ep_size: int
    num_nodes: int = 1

    def __post_init__(self) -> None:
        slots = self.physical_to_logical
        if slots.ndim != 2 or slots.dtype != np.int64:
            raise BadLocation(f"physical_to_logical must be int64 [layers, slots], got {slots.dtype} {list(slots.shape)}")
        if self.num_slots < self.num_experts:
            raise BadLocation(f"{self.num_slots} slots are too few for {self.num_experts} experts")
        if self.num_slots % self.ep_size:
            raise BadLocation(f"{self.num_slots} slots can't be dealt evenly to {self.ep_size} GPUs")
        if self.ep_size % self.num_nodes:
            raise BadLocation(f"{self.ep_size} GPUs can't be split evenly over {self.num_nodes} nodes")
        outside = (slots < 0) | (slots >= self.num_experts)
        if outside.any():
            layer, slot = np.argwhere(outside)[0].tolist()
            raise BadLocation(
                f"slot {slot} of sparse layer {layer} holds expert {slots[layer, slot]}, but there are {self.num_experts} experts"
            )
        missing = self.logical_count == 0
        if missing.any():
            layer, expert = np.argwhere(missing)[0].tolist()
            raise BadLocation(f"expert {expert} of sparse layer {layer} has no slot")

    @staticmethod
    def trivial(*, num_layers: int, num_experts: int, num_slots: int, ep_size: int, num_nodes: int = 1) -> ExpertLocation:
        """Slot s holds expert s % num_experts, in every layer."""
        row = np.arange(num_slots, dtype=np.int64) % num_experts
        return ExpertLocation(
            physical_to_logical=np.tile(row, (num_layers, 1)), num_experts=num_experts, ep_size=ep_size, num_nodes=num_nodes
        )

    @property
    def num_layers(self) -> int:
        return len(self.physical_to_logical)

    @property
    def num_slots(self) -> int:
        return int(self.physical_to_logical.shape[1])

    @property
    def slots_per_gpu(self) -> int:
        return self.num_slots // self.ep_size

    @property
    def gpus_per_node(self) -> int:
        return self.ep_size // self.num_nodes

    @cached_property
    def logical_count(self) -> Int64Array:
        """Replicas of every expert, int64 [L, E]."""
        num_layers = self.num_layers
        keys = self.physical_to_logical + np.arange(num_layers)[:, None] * self.num_experts
        counts = np.bincount(keys.ravel(), minlength=num_layers * self.num_experts)
        return counts.reshape(num_layers, self.num_experts).astype(np.int64)

    @cached_property
    def logical_to_physical(self) -> Int64Array:
        """Slots of every expert, ascending, padded with -1: int64 [L, E, most replicas of any expert]."""
        return logical_to_physical(self.physical_to_logical, self.logical_count)

    def gpu_of(self, slots: Int64Array) -> Int64Array:
        """The GPU of each slot."""
        return slots // self.slots_per_gpu

    def with_layer(self, layer: int, slots: Int64Array) -> ExpertLocation:
        """The same placement but for one layer, whose slots int64 [R] hold these experts."""
        changed = self.physical_to_logical.copy()
        changed[layer] = slots
        return ExpertLocation(
            physical_to_logical=changed, num_experts=self.num_experts, ep_size=self.ep_size, num_nodes=self.num_nodes
        )


def logical_to_physical(physical_to_logical: Int64Array, logical_count: Int64Array) -> Int64Array:
    """Slots int64 [L, R] and replica counts int64 [L, E] -> slots of every expert, ascending, -1 padded: int64 [L, E, max]."""
    num_layers, num_experts = logical_count.shape
    keys = physical_to_logical.astype(np.int16) if num_experts < 2**15 else physical_to_logical  # numpy sorts int16 by radix
    order = np.argsort(keys, axis=1, kind="stable")
    experts = np.take_along_axis(physical_to_logical, order, axis=1)
    first = np.cumsum(logical_count, axis=1) - logical_count
    rank = np.arange(order.shape[1]) - np.take_along_axis(first, experts, axis=1)
    slots = np.full((num_layers, num_experts, int(logical_count.max(initial=1))), -1, dtype=np.int64)
    slots[np.arange(num_layers)[:, None], experts, rank] = order
    return slots
