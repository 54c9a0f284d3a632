"""Replica choices `balanced` and `activated` where the tokens are: counts, gathering and split stay on the device, and the CPU
waits for nothing.

The same choices, bit for bit, as eplb's BatchChoice, which works on the CPU; this one is for tokens on a GPU. A layer's new
placement is written over the old one, so that a captured graph sees it. Knows one rank; the exchange of counts is the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moesaic.eplb.location import BadLocation, ExpertLocation, Int64Array
from moesaic.kernels.balanced_choice import BalancedTable, choose_balanced, count_choices, most_replicas

logger = logging.getLogger(__name__)

ROOM_FOR_GPUS = 8
"""GPUs of one expert that the tables hold at least, if it can ever have as many: placements change, their shapes can't."""


class DeviceBatchChoice:
    """A `ReplicaChoice` (eplb/replica_choice.py)."""

    def __init__(
        self,
        location: ExpertLocation,
        *,
        rank: int,
        gather_counts: Callable[[Tensor], Tensor],
        device: torch.device | str,
        by_activated: bool = False,
    ) -> None:
        """`gather_counts`: this source's tokens per expert int64 [E] -> those of all sources int64 [num, E], both on `device`,
        without a wait. `rank` is this source's row there. by_activated: the choice `activated`.
        """
        self._num_experts, self._num_slots, self._ep_size = location.num_experts, location.num_slots, location.ep_size
        self._rank, self._gather_counts, self._device, self._by_activated = rank, gather_counts, device, by_activated
        possible = min(location.num_slots - location.num_experts + 1, location.ep_size)
        needed = max(most_replicas(slots) for slots in location.physical_to_logical)
        self._most_gpus = max(2, needed, min(possible, ROOM_FOR_GPUS))
        self._tables = [self._table(slots) for slots in location.physical_to_logical]

    def select(self, layer_index: int, topk_ids: Tensor) -> Tensor:
        own = count_choices(topk_ids, self._num_experts)
        counts = self._gather_counts(own.total).contiguous()
        table = self._tables[layer_index]
        return choose_balanced(topk_ids, own, counts, table, rank=self._rank, by_activated=self._by_activated)

    def set_layer(self, layer_index: int, slots: Int64Array) -> None:
        """An expert on more GPUs than the tables hold is split over some of them only, and the log says so."""
        if slots.shape != (self._num_slots,):
            raise BadLocation(f"sparse layer {layer_index} has {self._num_slots} slots, got a map of shape {list(slots.shape)}")
        try:
            table = self._table(slots)
        except ValueError as error:
            raise BadLocation(f"sparse layer {layer_index}: {error}") from error
        self._tables[layer_index].assign(table)
        num_replicas = np.bincount(slots)
        if num_replicas.max() > self._most_gpus:
            expert = int(num_replicas.argmax())
            logger.warning(
                "expert %d of sparse layer %d has %d replicas; tokens are sent to those on %d GPUs",
                *(expert, layer_index, num_replicas[expert], self._most_gpus),
            )

    def _table(self, slots: Int64Array) -> BalancedTable:
        own = torch.from_numpy(slots.copy())
        return BalancedTable.of(
            own, num_experts=self._num_experts, num_gpus=self._ep_size, most_gpus=self._most_gpus, device=self._device
        )
