"""Joins the process groups of a rank and says where it stands to the model."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from moesaic.launch.models.parallel import ParallelContext
from moesaic.launch.topology import RankPlace, Topology


def join_process_groups(topology: Topology, place: RankPlace, *, init_method: str, backend: str, timeout_s: int) -> None:
    """Rendezvous of all ranks. Raises RuntimeError naming rank and address when it isn't complete in time."""
    if topology.world_size == 1:
        return
    # Step headers and counts travel between CPUs in any case.
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
    try:
        dist.init_process_group(
            backends,
            init_method=init_method,
            rank=place.rank,
            world_size=topology.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"rank {place.rank} could not meet the other {topology.world_size - 1} ranks at {init_method} "
            f"within {timeout_s} s: {error}"
        ) from error


def new_group_with_deadline(timeout_s: int) -> Callable[[tuple[int, ...]], dist.ProcessGroup]:
    """Creates groups whose collectives fail after `timeout_s`; only the members of a group call it."""

    def new_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
        timeout = timedelta(seconds=timeout_s)
        group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        return group

    return new_group


def make_parallel_context(
    topology: Topology,
    place: RankPlace,
    *,
    a2a_backend: str,
    dp_lm_head: bool,
    new_group: Callable[[tuple[int, ...]], dist.ProcessGroup],
) -> ParallelContext:
    """The rank's context with its groups. Collective: each rank asks `new_group` for the groups it is in, in the same order."""

    def own_group(rank_lists: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup | None:
        ranks = next(ranks for ranks in rank_lists if place.rank in ranks)
        if len(ranks) == 1:
            return None
        return new_group(ranks)

    size = topology.attn_tp_size
    return ParallelContext(
        rank=place.rank,
        world_size=topology.world_size,
        dp_rank=place.dp_rank,
        dp_size=topology.dp_size,
        attn_tp_rank=place.attn_tp_rank,
        attn_tp_size=size,
        ep_rank=place.ep_rank,
        ep_size=topology.ep_size,
        moe_tp_rank=place.moe_tp_rank,
        moe_tp_size=topology.moe_tp_size,
        dense_tp=topology.moe_dense_tp_size > 1,
        dp_lm_head=dp_lm_head,
        a2a_backend=a2a_backend,
        world_group=own_group((tuple(range(topology.world_size)),)),
        attn_tp_group=own_group(topology.attn_tp_groups),
        dp_group=own_group(topology.dp_groups),
    )
