"""What a sparse layer needs to know of a model and of its place among the ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Expert choice of one layer. Groups are expert groups."""

    num_experts: int
    topk: int
    num_groups: int
    topk_groups: int
    normalize: bool
    scaling_factor: float


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """Which slots a rank holds: a contiguous run of num_slots / ep_size."""

    num_slots: int
    ep_size: int
    ep_rank: int

    def __post_init__(self) -> None:
        if self.num_slots % self.ep_size:
            raise ValueError(f"{self.num_slots} expert slots can't be split evenly over ep_size {self.ep_size}")

    @property
    def num_local(self) -> int:
        return self.num_slots // self.ep_size

    @property
    def first(self) -> int:
        return self.ep_rank * self.num_local
