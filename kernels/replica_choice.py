"""Which replica serves each choice of an expert: logical ids to slots, by a table alone or by a table and random bits.

The random bits are a hash of (seed, step, place of the choice): no generator to keep, the same on every device, and a captured
graph draws anew because the step is read from memory. Knows one layer; what the tables hold is eplb's affair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.checks import check_number, check_tensor
from moesaic.kernels.gpu import uses_triton

WORD = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class ReplicaTable:
    """slots int64 [E, R]: the slots of each expert, num_replicas int64 [E] of them, padded with anything.

    Without `step` each choice goes to slots[:, 0] (static); with it, int64 [1], to a random replica (dynamic). 0 <= seed < 2**31.
    """

    slots: Tensor
    num_replicas: Tensor
    seed: int = 0
    step: Tensor | None = None

    def check(self, function: str, num_experts: int | None, like: Tensor) -> None:
        """Raises ValueError where the table doesn't fit the experts or the device."""
        check_tensor(
            function, "table.slots", self.slots, shape=(num_experts, None), dtypes=(torch.int64,), like=like, contiguous=True
        )
        shape = self.slots.shape[:1]
        check_tensor(function, "table.num_replicas", self.num_replicas, shape=shape, dtypes=(torch.int64,), like=like)
        check_number(function, "table.seed", self.seed, at_least=0, at_most=2**31 - 1)
        if self.step is not None:
            check_tensor(function, "table.step", self.step, shape=(1,), dtypes=(torch.int64,), like=like)


def choose_replicas(topk_ids: Tensor, table: ReplicaTable) -> Tensor:
    """topk_ids int64 [T, K], -1 = none -> slots int64 [T, K]; -1 stays -1. Raises ValueError."""
    if uses_triton(topk_ids):
        from moesaic.kernels.triton import topk as device

        return device.choose_replicas(topk_ids, table)
    return choose_replicas_reference(topk_ids, table)


def choose_replicas_reference(topk_ids: Tensor, table: ReplicaTable) -> Tensor:
    """The same in torch, any device; the same replicas, bit for bit."""
    check_tensor("choose_replicas", "topk_ids", topk_ids, shape=(None, None), dtypes=(torch.int64,))
    table.check("choose_replicas", None, topk_ids)
    known = topk_ids.clamp(min=0)
    turn = torch.zeros_like(topk_ids)
    if table.step is not None:
        stream = mix((table.step & WORD) ^ mix(torch.full_like(table.step, table.seed)))
        places = torch.arange(topk_ids.numel(), device=topk_ids.device).view_as(topk_ids)
        turn = mix((places & WORD) ^ stream) % table.num_replicas[known]
    return torch.where(topk_ids < 0, -1, table.slots[known, turn])


def mix(value: Tensor) -> Tensor:
    """A bijection of 32-bit words (in int64) that spreads every bit over all: MurmurHash3's finaliser (Appleby, 2011)."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & WORD
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & WORD
    return value ^ (value >> 16)
