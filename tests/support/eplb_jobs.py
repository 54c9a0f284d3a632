"""Weight movement and rebalance managers over gloo, one rank per process: for RankPool, and in processes that may die."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import rank_pool
import torch
import torch.distributed as dist
from eplb_cluster import CONFIG, Rank, num_ended
from eplb_network import MemoryExchange, Seam
from eplb_weights import ladder, make_weights, random_location, slots_that_lie

from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.mover import WeightMover
from moesaic.eplb.moves import LayerMoves, plan_moves
from moesaic.eplb.transfer import Exchange, Message, ProcessGroupWire, Quarantine, Wire


@dataclass(frozen=True, kw_only=True)
class GlooCase:
    """A layer's placements, one after another, on so many ranks of the pool."""

    world: int
    num_experts: int
    num_slots: int
    num_nodes: int
    num_placements: int
    seed: int


def gloo_locations(case: GlooCase) -> list[ExpertLocation]:
    rng = np.random.default_rng(case.seed)
    return [
        random_location(
            rng,
            num_layers=2,
            num_experts=case.num_experts,
            num_slots=case.num_slots,
            ep_size=case.world,
            num_nodes=case.num_nodes,
        )
        for _ in range(case.num_placements)
    ]


def gloo_moves(case: GlooCase) -> list[list[LayerMoves]]:
    """Per change of placement and layer."""
    locations = gloo_locations(case)
    return [
        [
            plan_moves(before, after, ep_size=case.world, num_nodes=case.num_nodes)
            for before, after in zip(old.physical_to_logical, new.physical_to_logical, strict=True)
        ]
        for old, new in itertools.pairwise(locations)
    ]


def move_job(rank: int, case: GlooCase) -> tuple[list[tuple[int, int]], int, int]:
    """Move from placement to placement; returns the slots that lie after any of them, staging bytes and weight bytes."""
    wire = ProcessGroupWire(rank_pool.group_of(tuple(range(case.world))))
    locations = gloo_locations(case)
    layers = make_weights(locations[0], rank)
    mover = WeightMover(layers=layers, wire=wire, quarantine=Quarantine(), clock=time.monotonic)
    lies = []
    for cycle, (moves, location) in enumerate(zip(gloo_moves(case), locations[1:], strict=True)):
        for layer, layer_moves in enumerate(moves):
            mover.begin(cycle, layer, layer_moves)
            while not mover.work(time.monotonic() + 0.001):
                os.sched_yield()
            mover.commit()
        lies += slots_that_lie(location, rank, layers)
    weight_bytes = sum(tensor[0].nbytes for tensor in layers[0]) * locations[0].slots_per_gpu
    return lies, mover.staging_bytes, weight_bytes


def poll_job(rank: int) -> tuple[bool, bool, bool]:
    """Whether a message that the other side hasn't posted is under way, is done later, and arrived."""
    group = rank_pool.group_of((0, 1))
    wire = ProcessGroupWire(group)
    data = torch.full((1 << 16,), rank, dtype=torch.uint8)
    target = torch.full_like(data, 9)
    early = False
    if rank == 0:
        exchange = wire.post([(1, data)], [(1, target)], 77)
        early = exchange.done()
    dist.barrier(group)
    if rank == 1:
        exchange = wire.post([(0, data)], [(0, target)], 77)
    for _ in range(1_000_000):
        if exchange.done():
            break
        os.sched_yield()
    return early, exchange.done(), bool((target == 1 - rank).all())


@dataclass(frozen=True, kw_only=True)
class ManagerCase:
    """Managers over gloo. In cycle 1, `victim` meets `fault`: "stall" (posts nothing more in it), "corrupt", or "die"."""

    world: int
    fault: Literal["", "stall", "corrupt", "die"]
    victim: int = 1
    after_posts: int = 0
    seed: int = 0


class FaultyWire:
    """Spoils or dies at one post over a real wire."""

    def __init__(self, wire: Wire, case: ManagerCase) -> None:
        self._wire = wire
        self._case = case if wire.rank == case.victim else replace(case, fault="")
        self._posts = 0
        self.rank, self.world_size = wire.rank, wire.world_size
        self.healed = False

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Exchange:
        self._posts += 1
        if self._case.fault and not self.healed and self._posts > self._case.after_posts:
            if self._case.fault == "die":
                os._exit(0)
            if self._case.fault == "stall":
                return MemoryExchange(1, lambda: None)
            if sends:
                peer, tensor = sends[0]
                spoiled = tensor.clone()
                spoiled[0] += 1
                sends = [(peer, spoiled), *sends[1:]]
                self.healed = True
        return self._wire.post(sends, receives, tag ^ self._case.seed << 24)  # a job must not meet the last one's messages


def manager_job(rank: int, case: ManagerCase) -> list[dict[str, Any]]:
    """Two cycles over gloo, words by all-gather; after each: status, slots that lie, placement."""
    return run_managers(rank, case, rank_pool.group_of(tuple(range(case.world))))


def run_managers(rank: int, case: ManagerCase, group: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(case.seed)
    locations = ladder(rng, 2, num_layers=3, num_experts=8, num_slots=12, ep_size=case.world)
    wire = FaultyWire(ProcessGroupWire(group), case)
    deadline = 0.4 if case.fault == "stall" else 30.0
    config = replace(CONFIG, gather_deadline_s=deadline, move_deadline_s=deadline, drain_deadline_s=deadline, step_budget_s=0.001)
    member = Rank(
        rank,
        wire,
        locations[0],
        Seam(),
        config=config,
        solve=lambda counts, location: locations[1].physical_to_logical,
        clock=time.monotonic,
    )
    reports: list[dict[str, Any]] = []
    for _ in range(2):
        before = num_ended(member.manager.status())
        member.manager.start_now()
        while member.manager.busy or num_ended(member.manager.status()) == before:
            own = torch.tensor([member.manager.word()])
            words = [torch.empty_like(own) for _ in range(case.world)]
            try:
                dist.all_gather(words, own, group=group)
            except RuntimeError:
                return [*reports, _report(member)]
            member.manager.advance([int(word) for word in words])
        reports.append(_report(member))
        wire.healed = True
    return reports


def _report(member: Rank) -> dict[str, Any]:
    return {
        "status": member.manager.status(),
        "lies": member.lies(),
        "placement": member.served.physical_to_logical.copy(),
    }


def run_managers_and_die(rank: int, case: ManagerCase, rendezvous: str, pipe: Any) -> None:
    """A process of its own, which the victim does not survive."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=case.world)
    pipe.send(run_managers(rank, case, dist.group.WORLD))
    pipe.close()
    os._exit(0)
