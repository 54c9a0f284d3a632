"""Where a model's routed experts lie on the ranks, and which replica the tokens of this rank go to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.attention.dp_attention import all_gather_rows
from moesaic.eplb.batch_split import planned_weights
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.replica_choice import ReplicaChoice, make_replica_choice
from moesaic.eplb.settings import SlotOptions
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.models.parallel import ParallelContext
from moesaic.moe.balanced_choice import DeviceBatchChoice
from moesaic.moe.communication import Communications

BATCH_ALGORITHMS = ("balanced", "activated")
"""Replica choices that look at the whole batch, and so need the counts of all ranks."""


def expert_location(config: ModelConfig, parallel: ParallelContext, options: SlotOptions) -> ExpertLocation:
    """The placement that the weights are loaded for."""
    if options.location is not None:
        return options.location
    return ExpertLocation.trivial(
        num_layers=len(config.sparse_layers),
        num_experts=config.n_routed_experts,
        num_slots=config.n_routed_experts,
        ep_size=parallel.ep_size,
    )


def replicas_communicate(parallel: ParallelContext, options: SlotOptions) -> bool:
    """Whether the choice of replicas asks other ranks, in every sparse layer."""
    return options.replica_choice in BATCH_ALGORITHMS and _TokenSource.of(parallel).count > 1


def choose_replicas(
    location: ExpertLocation, parallel: ParallelContext, options: SlotOptions, device: str, communications: Communications
) -> ReplicaChoice | None:
    """What maps logical experts to slots; None where a slot's number is its expert's and stays so."""
    is_identity = (
        location.num_slots == location.num_experts and (location.physical_to_logical == np.arange(location.num_slots)).all()
    )
    if is_identity and not options.movable:
        return None
    source = _TokenSource.of(parallel)
    algorithm = options.replica_choice

    def gather_counts(counts: Tensor) -> Tensor:
        return source.gather(counts, communications)

    if algorithm in BATCH_ALGORITHMS and torch.device(device).type == "cuda":
        by_activated = algorithm == "activated"
        return DeviceBatchChoice(location, rank=source.index, gather_counts=gather_counts, device=device, by_activated=by_activated)
    weights = None
    if algorithm == "probability":
        weights = planned_weights(location, np.ones((location.num_layers, location.num_experts)))
    return make_replica_choice(
        algorithm,
        location,
        rank=source.index if algorithm in BATCH_ALGORITHMS else source.ep_rank,
        seed=options.seed,
        device=torch.device(device),
        weights=weights,
        gather_counts=gather_counts,
    )


@dataclass(frozen=True, kw_only=True)
class _TokenSource:
    """Who brings the tokens that this rank sees. Ranks that hold the same tokens must choose alike.

    With an all-to-all every rank has tokens of its own. Without one the ranks of a DP group hold the same: they choose as their
    leader, the expert rank `ep_rank`, and count once. `index` among `count` sources, which `group` joins.
    """

    index: int
    count: int
    group: dist.ProcessGroup | None
    ep_rank: int

    @staticmethod
    def of(parallel: ParallelContext) -> _TokenSource:
        if parallel.a2a_backend != "none":
            return _TokenSource(
                index=parallel.rank, count=parallel.world_size, group=parallel.world_group, ep_rank=parallel.ep_rank
            )
        leader = parallel.dp_rank * parallel.attn_tp_size
        return _TokenSource(
            index=parallel.dp_rank, count=parallel.dp_size, group=parallel.dp_group, ep_rank=leader // parallel.moe_tp_size
        )

    def gather(self, counts: Tensor, communications: Communications) -> Tensor:
        """One source's tokens per expert [E] -> those of all, [count, E]."""
        row = counts.unsqueeze(0)
        return row if self.count == 1 else all_gather_rows(row, self.group, self.count, "count gather", communications)
