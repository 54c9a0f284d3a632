"""Clusters of rebalance managers: many ranks in one process, stepped in lockstep over a network in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from eplb_network import Killed, MemoryNetwork, Seam
from eplb_weights import make_counts, make_weights, slots_that_lie

from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.decision import BackgroundPlan
from moesaic.eplb.location import ExpertLocation, Int64Array
from moesaic.eplb.manager import RebalanceManager
from moesaic.eplb.mover import WeightMover
from moesaic.eplb.status import RebalanceStatus
from moesaic.eplb.transaction import Phase, State
from moesaic.eplb.transfer import Quarantine, TreeSum, Wire

CONFIG = RebalanceConfig(
    num_iterations=3,
    step_budget_s=0.5,
    gather_deadline_s=20.0,
    plan_deadline_s=20.0,
    move_deadline_s=20.0,
    drain_deadline_s=20.0,
    cost_s_per_gib=0.0,
)


class SeamMover(WeightMover):
    """Its commits are events too."""

    seam: Seam

    def commit(self) -> None:
        self.seam.passes("commit")
        super().commit()
        self.seam.passes("committed")


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

    @property
    def undecided_layer(self) -> int | None:
        """The sparse layer that this rank has staged and said so, and of which it has not yet heard what the others said."""
        manager = self.manager
        return manager._layer if manager._phase == Phase.MOVE and manager._state == State.READY else None

    def roll_forward(self) -> None:
        """Commit the undecided layer, for survivors of a death in the middle of a word exchange: its weights are still staged.

        moesaic itself doesn't go on without a rank; the protocol would let it.
        """
        assert self.undecided_layer is not None, "no layer is undecided"
        self.manager._commit()
        self.manager._say(State.WORKING)

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
