"""Clusters of rebalance managers: many ranks in one process over a network in memory, or one rank per process over gloo.

Every weight holds its expert and layer, so that a look at the slots says whether weights and map agree. A `Seam` sees every message
of the protocol and fails, kills, corrupts or loses one of them.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import rank_pool
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.eplb.balancedness import gpu_loads
from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.decision import BackgroundPlan
from moesaic.eplb.location import ExpertLocation, Int64Array
from moesaic.eplb.manager import RebalanceManager
from moesaic.eplb.mover import WeightMover
from moesaic.eplb.moves import LayerMoves, plan_moves
from moesaic.eplb.status import RebalanceStatus
from moesaic.eplb.transfer import Exchange, Message, ProcessGroupWire, Quarantine, TransferError, TreeSum, Wire

Action = Literal["fail", "kill", "corrupt", "lose"]


class Killed(BaseException):
    """The rank is dead: nothing of it runs after this."""


@dataclass
class Seam:
    """Counts the events of all ranks by kind; the one numbered `at` of kind `kind` meets with `action`."""

    kind: str = ""
    at: int = -1
    action: Action = "fail"
    seen: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def passes(self, kind: str) -> Action | None:
        """Raises for "fail" and "kill", returns the others."""
        index = self.seen[kind]
        self.seen[kind] += 1
        if kind != self.kind or index != self.at:
            return None
        if self.action == "fail":
            raise TransferError(f"injected at {kind} {index}")
        if self.action == "kill":
            raise Killed
        return self.action


class MemoryExchange:
    def __init__(self, num_messages: int, ended: Callable[[], None]) -> None:
        self.open = num_messages
        self._ended = ended

    def done(self) -> bool:
        if not self.open:
            self._ended()
        return not self.open


class MemoryNetwork:
    """Messages match by sender, receiver and tag, in order; the bytes travel once both sides have posted, as with gloo."""

    def __init__(self, world_size: int, seam: Seam) -> None:
        self.world_size = world_size
        self.seam = seam
        self._sends: dict[tuple[int, int, int], deque[tuple[Tensor, MemoryExchange]]] = defaultdict(deque)
        self._receives: dict[tuple[int, int, int], deque[tuple[Tensor, MemoryExchange]]] = defaultdict(deque)

    def wire(self, rank: int) -> MemoryWire:
        return MemoryWire(self, rank)

    def post(self, rank: int, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Exchange:
        action = self.seam.passes("post")
        exchange = MemoryExchange(len(sends) + len(receives), self._passes_end)
        if action == "lose":
            return exchange
        for peer, tensor in sends:
            data = tensor
            if action == "corrupt":
                data = tensor.clone()
                data.view(-1)[0] += 1
                action = None
            self._sends[rank, peer, tag].append((data, exchange))
            self._match((rank, peer, tag))
        for peer, tensor in receives:
            self._receives[peer, rank, tag].append((tensor, exchange))
            self._match((peer, rank, tag))
        return exchange

    def _passes_end(self) -> None:
        self.seam.passes("end")

    def _match(self, key: tuple[int, int, int]) -> None:
        while self._sends[key] and self._receives[key]:
            (data, sent), (target, received) = self._sends[key].popleft(), self._receives[key].popleft()
            assert data.shape == target.shape, f"{key}: {data.shape} sent, {target.shape} expected"
            target.copy_(data)
            sent.open -= 1
            received.open -= 1


class MemoryWire:
    """One rank's end of a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork, rank: int) -> None:
        self._network = network
        self.rank = rank
        self.world_size = network.world_size

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Exchange:
        return self._network.post(self.rank, sends, receives, tag)


class SeamMover(WeightMover):
    """Its commits are events too."""

    seam: Seam

    def commit(self) -> None:
        self.seam.passes("commit")
        super().commit()
        self.seam.passes("committed")


def make_weights(location: ExpertLocation, rank: int, *, width: int = 6) -> list[list[Tensor]]:
    """Per layer: a matrix stored transposed, one whose columns are spread, an FP8 one, and one scale per expert."""
    layers = []
    per_gpu = location.slots_per_gpu
    for layer in range(location.num_layers):
        matrix = torch.empty(per_gpu, width, 5).transpose(1, 2)
        spread = torch.empty(per_gpu, 3, 2 * width)[..., ::2]
        fp8 = torch.empty(per_gpu, 3, width, dtype=torch.float8_e4m3fn)
        tensors = [matrix, spread, fp8, torch.empty(per_gpu)]
        signature = tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors)
        for local in range(per_gpu):
            expert = int(location.physical_to_logical[layer, rank * per_gpu + local])
            for tensor, value in zip(tensors, expert_weights(layer, expert, signature), strict=True):
                tensor[local] = value
        layers.append(tensors)
    return layers


@lru_cache(maxsize=1000)
def expert_weights(layer: int, expert: int, signature: tuple[tuple[torch.Size, torch.dtype], ...]) -> list[Tensor]:
    """What a slot that holds this expert must hold, in tensors of these shapes and types."""
    values = []
    for index, (shape, dtype) in enumerate(signature):
        ramp = torch.arange(max(1, shape.numel())).view(shape) + 7 * index + 50 * layer + 3 * expert
        values.append((ramp % 251).to(dtype))
    return values


def slots_that_lie(location: ExpertLocation, rank: int, layers: Sequence[Sequence[Tensor]]) -> list[tuple[int, int]]:
    """(layer, slot) of this rank whose weights are not those that the placement says."""
    first = rank * location.slots_per_gpu
    found = []
    for layer, tensors in enumerate(layers):
        signature = tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors)
        for slot in range(first, first + location.slots_per_gpu):
            expected = expert_weights(layer, int(location.physical_to_logical[layer, slot]), signature)
            if not all(torch.equal(tensor[slot - first], value) for tensor, value in zip(tensors, expected, strict=True)):
                found.append((layer, slot))
    return found


def random_location(
    rng: np.random.Generator, *, num_layers: int, num_experts: int, num_slots: int, ep_size: int, num_nodes: int = 1
) -> ExpertLocation:
    """Every expert at least once, the rest at random, shuffled."""
    rows = [
        rng.permutation(np.concatenate([np.arange(num_experts), rng.integers(0, num_experts, num_slots - num_experts)]))
        for _ in range(num_layers)
    ]
    return ExpertLocation(
        physical_to_logical=np.array(rows, dtype=np.int64), num_experts=num_experts, ep_size=ep_size, num_nodes=num_nodes
    )


def make_counts(rank: int, num_layers: int, num_experts: int) -> Int64Array:
    """Tokens per expert that a rank has counted: the higher its number, the more."""
    return np.tile(10 * np.arange(1, num_experts + 1) + rank, (num_layers, 1))


def ladder(
    rng: np.random.Generator, num_steps: int, *, num_layers: int, num_experts: int, num_slots: int, ep_size: int
) -> list[ExpertLocation]:
    """Random placements, each better than the one before in every layer, for the counts of all ranks."""
    counts = sum(make_counts(rank, num_layers, num_experts) for rank in range(ep_size))
    drawn = [
        random_location(rng, num_layers=num_layers, num_experts=num_experts, num_slots=num_slots, ep_size=ep_size)
        for _ in range(40)
    ]
    slots = np.array([location.physical_to_logical for location in drawn])
    busiest = np.array([gpu_loads(location, counts).max(axis=-1) for location in drawn])
    picked = np.argsort(-busiest, axis=0, kind="stable")[np.linspace(0, 39, num_steps).astype(int)]
    layers = np.arange(num_layers)
    assert (np.diff(busiest[picked, layers], axis=0) < 0).all()
    return [ExpertLocation(physical_to_logical=slots[row, layers], num_experts=num_experts, ep_size=ep_size) for row in picked]


CONFIG = RebalanceConfig(
    num_iterations=3,
    step_budget_s=0.5,
    gather_deadline_s=20.0,
    plan_deadline_s=20.0,
    move_deadline_s=20.0,
    drain_deadline_s=20.0,
    cost_s_per_gib=0.0,
)


class Rank:
    """A manager with weights of its own. `served`: the placement that forwards would use."""

    def __init__(
        self,
        rank: int,
        wire: Wire,
        location: ExpertLocation,
        seam: Seam,
        *,
        config: RebalanceConfig,
        solve: Callable[[Int64Array, ExpertLocation], Int64Array],
        clock: Callable[[], float],
    ) -> None:
        self.layers = make_weights(location, rank)
        self.quarantine = Quarantine()
        self.mover = SeamMover(layers=self.layers, wire=wire, quarantine=self.quarantine, clock=clock)
        self.mover.seam = seam
        self.served = location
        counts = make_counts(rank, location.num_layers, location.num_experts)
        self.counts = np.stack([counts // 3, counts - counts // 3])  # prefill, decode
        self.manager = RebalanceManager(
            rank=rank,
            config=config,
            location=location,
            take_counts=self.counts.copy,
            start_sum=lambda array, cycle: TreeSum(wire, self.quarantine, array, cycle),
            solve=solve,
            mover=self.mover,
            quarantine=self.quarantine,
            switch=self._switch,
            clock=clock,
        )

    def _switch(self, location: ExpertLocation, layer: int) -> None:
        changed = np.flatnonzero((location.physical_to_logical != self.served.physical_to_logical).any(axis=1))
        assert set(changed.tolist()) <= {layer}
        self.served = location

    def lies(self) -> list[tuple[int, int]]:
        """Slots whose weights are not what the served map says, plus a mark if manager and server differ."""
        found = slots_that_lie(self.served, self.manager.rank, self.layers)
        same = np.array_equal(self.served.physical_to_logical, self.manager.location.physical_to_logical)
        return found if same else [*found, (-1, -1)]


class Cluster:
    """All ranks in one process, stepped in lockstep; the clock moves `tick_s` per step. Solves give `wanted`, one after another."""

    def __init__(
        self,
        location: ExpertLocation,
        wanted: Sequence[ExpertLocation],
        *,
        seam: Seam | None = None,
        config: RebalanceConfig = CONFIG,
        tick_s: float = 1.0,
    ) -> None:
        self.now = 0.0
        self.seam = seam or Seam()
        self.network = MemoryNetwork(location.ep_size, self.seam)
        self.wanted = list(wanted)
        self.tick_s = tick_s
        self.hold_planner: dict[int, threading.Event] = {}
        self.dead: set[int] = set()
        self.steps = 0
        self.ranks = [
            Rank(
                rank,
                self.network.wire(rank),
                location,
                self.seam,
                config=config,
                solve=self._solver(rank),
                clock=lambda: self.now,
            )
            for rank in range(location.ep_size)
        ]

    def _solver(self, rank: int) -> Callable[[Int64Array, ExpertLocation], Int64Array]:
        def solve(counts: Int64Array, location: ExpertLocation) -> Int64Array:
            if rank in self.hold_planner:
                self.hold_planner[rank].wait(30)
            # The first of the wanted placements that is not yet there.
            for wanted in self.wanted:
                if not np.array_equal(wanted.physical_to_logical, location.physical_to_logical):
                    return wanted.physical_to_logical
            return location.physical_to_logical

        return solve

    def words(self) -> list[int] | None:
        """All ranks' words, or None when one died on its way."""
        words = []
        for rank in self.ranks:
            try:
                words.append(rank.manager.word())
            except Killed:
                self.dead.add(rank.manager.rank)
        return None if self.dead else words

    def step(self, *, hears: Callable[[int], bool] = lambda rank: True, garble: Callable[[list[int]], None] | None = None) -> bool:
        """One step of all; False once a rank is dead. `hears`: ranks that the exchange reaches; `garble`: changes the words."""
        self._join_planners()
        self.steps += 1
        self.now += self.tick_s
        words = self.words()
        if words is None:
            return False
        if garble is not None:
            garble(words)
        for rank in self.ranks:
            if hears(rank.manager.rank):
                try:
                    rank.manager.advance(words)
                except Killed:
                    self.dead.add(rank.manager.rank)
        return not self.dead

    def _join_planners(self) -> None:
        for rank in self.ranks:
            activity = rank.manager._activity
            if isinstance(activity, BackgroundPlan) and rank.manager.rank not in self.hold_planner:
                assert activity._ended.wait(30), "a planner hangs"

    def run_until(self, condition: Callable[[], bool], limit: int = 300) -> None:
        """Step until it holds or a rank is dead."""
        for _ in range(limit):
            if condition() or not self.step():
                return
        raise AssertionError(f"not reached in {limit} steps: {self.status()}")

    def status(self, rank: int = 0) -> RebalanceStatus:
        return self.ranks[rank].manager.status()

    def run_cycle(self) -> None:
        """Until one more cycle has ended on all ranks, whatever its end."""
        before = num_ended(self.status())
        self.run_until(lambda: num_ended(self.status()) > before and not self.ranks[0].manager.busy)

    @property
    def survivors(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.manager.rank not in self.dead]


def num_ended(status: RebalanceStatus) -> int:
    return status.committed_cycles + status.abandoned_cycles + status.skipped_cycles


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
    import time

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
    import time

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
