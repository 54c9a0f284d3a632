"""Replica choice `balanced` where the tokens are: counts, gathering and split stay on the device, and the CPU waits for nothing.

The same choices, bit for bit, as eplb's BatchChoice, which works on the CPU; this one is for tokens on a GPU. Knows one rank; the
exchange of counts is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.eplb.location import BadLocation, ExpertLocation, Int64Array
from moesaic.kernels.balanced_choice import BalancedTable, choose_balanced, count_choices


class DeviceBalancedChoice:
    """A `ReplicaChoice` (eplb/replica_choice.py). A captured graph holds a layer's tables: after `set_layer` capture anew."""

    def __init__(
        self,
        location: ExpertLocation,
        *,
        rank: int,
        gather_counts: Callable[[Tensor], Tensor],
        device: torch.device | str,
    ) -> None:
        """`gather_counts`: this source's tokens per expert int64 [E] -> those of all sources int64 [num, E], both on `device`.

        `rank` is this source's row there.
        """
        self._num_experts, self._num_slots, self._ep_size = location.num_experts, location.num_slots, location.ep_size
        self._rank, self._gather_counts, self._device = rank, gather_counts, device
        self._tables = [self._table(slots) for slots in location.physical_to_logical]

    def select(self, layer_index: int, topk_ids: Tensor) -> Tensor:
        own = count_choices(topk_ids, self._num_experts)
        counts = self._gather_counts(own.total).contiguous()
        return choose_balanced(topk_ids, own, counts, self._tables[layer_index], rank=self._rank)

    def set_layer(self, layer_index: int, slots: Int64Array) -> None:
        if slots.shape != (self._num_slots,):
            raise BadLocation(f"sparse layer {layer_index} has {self._num_slots} slots, got a map of shape {list(slots.shape)}")
        try:
            self._tables[layer_index] = self._table(slots)
        except ValueError as error:
            raise BadLocation(f"sparse layer {layer_index}: {error}") from error

    def _table(self, slots: Int64Array) -> BalancedTable:
        own = torch.from_numpy(slots.copy())
        return BalancedTable.of(own, num_experts=self._num_experts, num_gpus=self._ep_size, device=self._device)
