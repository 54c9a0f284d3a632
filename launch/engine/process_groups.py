"""Joins the process groups of a rank and says where it stands to the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from moesaic.launch.engine.staged_group import STAGED, register_staged
from moesaic.launch.models.parallel import ParallelContext
from moesaic.launch.topology import RankPlace, Topology


def join_process_groups(topology: Topology, place: RankPlace, *, init_method: str, backend: str, timeout_s: int) -> None:
    """Rendezvous of all ranks. Raises RuntimeError naming rank and address when it isn't complete in time."""
    if topology.world_size == 1:
        return
    if backend == STAGED:
        register_staged()
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


NewGroup = Callable[[tuple[int, ...], str], dist.ProcessGroup]
"""Called with the ranks of a group and what it is for: collectives that two threads submit must not share a group."""


def new_group_with_deadline(timeout_s: int) -> NewGroup:
    """Creates groups whose collectives fail after `timeout_s`; only the members of a group call it."""

    def new_group(ranks: tuple[int, ...], purpose: str) -> dist.ProcessGroup:
        timeout = timedelta(seconds=timeout_s)
        group: dist.ProcessGroup = dist.new_group(
            list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=f"{purpose} of ranks {ranks}"
        )
        return group

    return new_group


@dataclass(frozen=True, kw_only=True)
class EngineGroups:
    """Groups of all ranks for what is not a forward; None where there is nothing to say to anybody.

    headers: for the thread that schedules. failures: for the thread that runs forwards, beside them. rebalance: for the movement of
    weights alone.
    """

    headers: dist.ProcessGroup | None = None
    failures: dist.ProcessGroup | None = None
    rebalance: dist.ProcessGroup | None = None


def make_engine_groups(topology: Topology, *, rebalances: bool, new_group: NewGroup) -> EngineGroups:
    """Collective, as `make_parallel_context`."""
    ranks = tuple(range(topology.world_size))
    if len(ranks) == 1:
        return EngineGroups()
    return EngineGroups(
        headers=new_group(ranks, "headers"),
        failures=new_group(ranks, "failures"),
        rebalance=new_group(ranks, "rebalance") if rebalances else None,
    )


def make_parallel_context(
    topology: Topology,
    place: RankPlace,
    *,
    a2a_backend: str,
    dp_lm_head: bool,
    new_group: NewGroup,
) -> ParallelContext:
    """The rank's context with its groups. Collective: each rank asks `new_group` for the groups it is in, in the same order."""

    def own_group(rank_lists: tuple[tuple[int, ...], ...], purpose: str = "forward") -> dist.ProcessGroup | None:
        ranks = next(ranks for ranks in rank_lists if place.rank in ranks)
        if len(ranks) == 1:
            return None
        return new_group(ranks, purpose)

    size = topology.attn_tp_size
    everyone = (tuple(range(topology.world_size)),)
    return ParallelContext(
        rank=place.rank,
        world_size=topology.world_size,
        ranks_per_node=topology.ranks_per_node,
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
        world_group=own_group(everyone),
        attn_tp_group=own_group(topology.attn_tp_groups),
        dp_group=own_group(topology.dp_groups),
        rows_group=None if a2a_backend == "none" else own_group(everyone, "rows"),
    )
