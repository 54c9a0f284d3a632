"""Runs rebalancing on one rank, a little in every step: gather counts, plan, decide, move layer by layer.

Once per step and between forwards, `word()` does at most a step budget of work and returns this rank's word, the caller exchanges
the words with its step header, and `advance(words)` draws the same conclusion on all ranks. A failure or a passed deadline on any
rank abandons the cycle everywhere: each layer is then wholly old or wholly new, the same on all ranks, and the next cycle works.
Knows no model and no server: counts, sum, solver and the map's owner are given to it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.decision import BackgroundPlan, CyclePlan, Decision, Solve, Window, make_plan
from moesaic.eplb.gather import Gather, StartSum
from moesaic.eplb.location import ExpertLocation, Int64Array
from moesaic.eplb.mover import ChecksumError, Mover
from moesaic.eplb.serving_time import ServingTime
from moesaic.eplb.status import RebalanceStatus
from moesaic.eplb.transaction import CYCLE_BITS, Cause, LayerTransaction, Phase, State, Verdict, Word, judge
from moesaic.eplb.transfer import Quarantine
from moesaic.eplb.window_balance import describe

_DECISION_BITS = 4
_FAILURES = {Phase.GATHER: Cause.GATHER_FAILED, Phase.PLAN: Cause.PLAN_FAILED, Phase.MOVE: Cause.TRANSFER_FAILED}
logger = logging.getLogger(__name__)


class Activity(Protocol):
    """What a phase does. `work` and `drain` return True when finished, and raise when they can't go on."""

    def work(self, until: float) -> bool: ...
    def drain(self, until: float) -> bool: ...
    def abandon(self) -> None: ...
    @property
    def waiting_for(self) -> int | None: ...


class RebalanceManager:
    """See the module's docstring. All ranks are constructed alike and called equally often."""

    def __init__(
        self,
        *,
        rank: int,
        config: RebalanceConfig,
        location: ExpertLocation,
        take_counts: Callable[[], Int64Array],
        start_sum: StartSum,
        solve: Solve,
        mover: Mover,
        quarantine: Quarantine,
        switch: Callable[[ExpertLocation, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """take_counts: this rank's tokens per expert since it was last called, int64 [M, L, E], M as FORWARD_MODES. solve: see
        decision.Solve.

        switch(location, layer): from now on forwards use `location`, which differs from the last in that layer.
        """
        self.rank = rank
        self.location = location
        self._config = config
        self._take_counts = take_counts
        self._start_sum = start_sum
        self._solve = solve
        self._mover = mover
        self._quarantine = quarantine
        self._switch = switch
        self._clock = clock
        self._cycle = 0
        self._num_forwards = 0
        self._start_now = False
        self._plan: CyclePlan | None = None
        self._replaced: ExpertLocation | None = None  # by the last cycle that moved weights, until its gain is known
        self._stalled: list[BackgroundPlan] = []
        self._serving = ServingTime(config.cost_s_per_gib / (1 << 30))
        self._report = _Report()
        self._held_up_by: int | None = None
        self._left_s = 0.0  # of this step's budget
        self._enter(Phase.IDLE, None)

    @property
    def busy(self) -> bool:
        """A cycle is under way: all ranks must keep on stepping, even without requests."""
        return self._phase != Phase.IDLE or self._start_now

    @property
    def calm(self) -> bool:
        """The next `word` and `advance` touch neither counts nor weights, so a forward may run meanwhile. The same on all ranks."""
        return not self.busy and self._num_forwards + 1 < self._config.num_iterations

    def start_now(self) -> None:
        """Begin a cycle in the next step. To be called in the same step on all ranks; without effect during a cycle."""
        self._start_now = self._phase == Phase.IDLE

    def word(self) -> int:
        """Do a part of the work and say how far it is. Between forwards, once per step, before `advance`."""
        began = self._clock()
        self._serving.end_forward(began, moving=self._phase == Phase.MOVE)
        self._stalled = [planner for planner in self._stalled if not planner.ended()]
        self._report.quarantined_messages = self._quarantine.count()
        if self._phase == Phase.IDLE:
            blocked = self._report.quarantined_messages > self._config.max_quarantined
            self._say(State.FAILED if blocked else State.READY, Cause.BLOCKED if blocked else Cause.NONE)
        self._work(began + self._config.step_budget_s)
        self._check_deadline()
        self._left_s = self._config.step_budget_s - self._spend(began)
        return self._word()

    def advance(self, words: Sequence[int], *, forward: bool = True) -> None:
        """All ranks' words of this step, in rank order; `forward`: this step goes on to run the model.

        Raises what a commit raises when it can't be completed: this rank must not run another forward.
        """
        began = self._clock()
        said = [Word.unpack(word) for word in words]
        verdict = judge(said, (self._phase, self._cycle, self._layer))
        self._held_up_by = verdict.rank if verdict.state == State.WORKING else None
        if self._phase == Phase.IDLE and verdict.cause != Cause.OUT_OF_STEP:
            self._advance_idle(verdict, forward)
        elif verdict.state == State.FAILED:
            self._abandon(verdict, said)
        elif verdict.state == State.READY:
            self._end_phase(said)
        else:
            self._pausing = False
        self._work(self._clock() + self._left_s)
        self._spend(began)
        if forward:
            self._serving.begin_forward(self._clock())

    def status(self) -> RebalanceStatus:
        """The manager now. Changes nothing; may be called from another thread."""
        plan, report = self._plan, self._report
        return RebalanceStatus(
            phase=self._phase.name.lower(),
            cycle=self._cycle,
            layers_done=report.layers_done,
            layers_total=report.layers_total,
            layers_moved=report.layers_moved,
            committed_cycles=report.committed,
            abandoned_cycles=report.abandoned,
            skipped_cycles=report.skipped,
            degraded=bool(report.last_abandoned or self._stalled or report.quarantined_messages),
            last_cause=report.cause,
            last_skip_reason=report.skip_reason,
            stalled_planners=len(self._stalled),
            quarantined_messages=report.quarantined_messages,
            bytes_moved=self._mover.bytes_moved,
            last_plan_s=report.plan_s,
            last_move_s=report.move_s,
            last_longest_commit_s=report.longest_commit_s,
            last_balances=plan.balances if plan is not None else {},
            last_predicted=plan.predicted if plan is not None else None,
            last_predicted_saving_s=plan.saving_s if plan is not None else 0.0,
            last_predicted_cost_s=plan.cost_s if plan is not None else 0.0,
            last_measured_cost_s=self._serving.last_cost_s,
            last_realised_gain_s=report.realised_gain_s,
        )

    def _spend(self, began: float) -> float:
        """Seconds since `began`, which serving has lost to this cycle."""
        spent = self._clock() - began
        if self._phase == Phase.MOVE:
            self._serving.spend_moving(spent)
        return spent

    def _enter(self, phase: Phase, activity: Activity | None, layer: int = 0, *, pausing: bool = False) -> None:
        """Begin a phase, on all ranks in the same step."""
        deadlines = {
            Phase.GATHER: self._config.gather_deadline_s,
            Phase.PLAN: self._config.plan_deadline_s,
            Phase.MOVE: self._config.move_deadline_s,
            Phase.DRAIN: self._config.drain_deadline_s,
        }
        self._phase, self._activity, self._layer, self._pausing = phase, activity, layer, pausing
        self._began = self._clock()
        self._deadline = self._began + deadlines.get(phase, float("inf"))
        self._held_up_by = None
        self._say(State.READY if activity is None else State.WORKING)

    def _say(self, state: State, cause: Cause = Cause.NONE, payload: int = 0) -> None:
        self._state, self._cause, self._payload = state, cause, payload

    def _word(self) -> int:
        payload = self._payload
        if self._state == State.WORKING and self._activity is not None and self._activity.waiting_for is not None:
            payload = self._activity.waiting_for + 1
        word = Word(phase=self._phase, cycle=self._cycle, layer=self._layer, state=self._state, cause=self._cause, payload=payload)
        return word.pack()

    def _work(self, until: float) -> None:
        """Get on with the phase; whatever goes wrong becomes this rank's word."""
        if self._activity is None or self._state != State.WORKING or self._pausing:
            return
        draining = self._phase == Phase.DRAIN
        try:
            finished = self._activity.drain(until) if draining else self._activity.work(until)
        except Exception as error:
            if draining:
                self._activity.abandon()
                finished = True
            else:
                cause = Cause.CHECKSUM if isinstance(error, ChecksumError) else _FAILURES[self._phase]
                self._say(State.FAILED, cause)
                logger.warning("rebalance %d: rank %d: %s: %s", self._cycle, self.rank, cause.text, error)
                return
        if finished:
            payload = 0
            if self._phase == Phase.PLAN and isinstance(self._activity, BackgroundPlan):
                plan = self._activity.result()
                payload = plan.digest() << _DECISION_BITS | plan.decision
            self._say(State.READY, payload=payload)

    def _check_deadline(self) -> None:
        if self._clock() < self._deadline or self._state == State.FAILED:
            return
        working, culprit = self._state == State.WORKING, self._held_up_by
        if self._phase == Phase.DRAIN:
            if working and self._activity is not None:
                self._activity.abandon()
                self._say(State.READY)
        elif culprit is not None and culprit != self.rank:
            self._say(State.FAILED, Cause.RANK_STALLED, culprit)
        elif working:
            self._say(State.FAILED, Cause.PLAN_STALLED if self._phase == Phase.PLAN else Cause.OWN_DEADLINE)

    def _advance_idle(self, verdict: Verdict, forward: bool) -> None:
        self._num_forwards += forward
        if not self._start_now and self._num_forwards < self._config.num_iterations:
            return
        self._start_now = False
        if verdict.state == State.FAILED:
            self._num_forwards = 0
            self._count_abandoned(verdict)
            return
        self._cycle = (self._cycle + 1) % (1 << CYCLE_BITS)
        cycle = self._cycle
        self._enter(Phase.GATHER, Gather(lambda: self._start_sum(self._take_counts(), cycle)))

    def _end_phase(self, words: list[Word | None]) -> None:
        """All ranks are ready."""
        if self._phase == Phase.DRAIN:
            self._enter(Phase.IDLE, None)
        elif isinstance(self._activity, Gather):
            self._enter(Phase.PLAN, BackgroundPlan(self._planning(self._activity.result())))
        elif isinstance(self._activity, BackgroundPlan):
            self._decide(self._activity.result(), words)
        else:
            self._commit()
            self._next_layer()

    def _planning(self, counts: Int64Array) -> Callable[[], CyclePlan]:
        window = Window(counts=counts, num_forwards=self._num_forwards, replaced=self._replaced)
        location, measured, expert_bytes = self.location, self._serving.measured(), self._mover.expert_bytes()
        return lambda: make_plan(
            window, location, solve=self._solve, measured=measured, expert_bytes=expert_bytes, config=self._config
        )

    def _decide(self, plan: CyclePlan, words: list[Word | None]) -> None:
        """All ranks must have the same plan; rank 0, with its own measurements, says whether it is carried out."""
        said = [word.payload for word in words if word is not None]
        for rank, payload in enumerate(said):
            if payload >> _DECISION_BITS != said[0] >> _DECISION_BITS:
                self._abandon(Verdict(state=State.FAILED, rank=rank, cause=Cause.PLAN_DIFFERS), words)
                return
        self._plan = plan
        self._report.plan_s = self._clock() - self._began
        if self._replaced is not None:
            self._report.realised_gain_s = plan.realised_gain_s
            self._log("the last one gained %.3f s over %d forwards", plan.realised_gain_s, self._num_forwards)
            self._replaced = None
        decision = Decision(said[0] & (1 << _DECISION_BITS) - 1)
        expected = f"{describe(plan.balances, plan.predicted)}; saving {plan.saving_s:.3f} s, cost {plan.cost_s:.3f} s"
        if decision != Decision.MOVE:
            self._log("skipped, %s: %s", decision.text, expected)
            self._report.skipped += 1
            self._report.skip_reason = decision.text
            self._finish()
            return
        self._log("moves %d layers: %s", len(plan.moves), expected)
        self._report.layers_total, self._report.layers_done, self._report.longest_commit_s = len(plan.moves), 0, 0.0
        self._move_began, self._before_move = self._clock(), self.location
        self._next_layer()

    def _next_layer(self) -> None:
        assert self._plan is not None, "layers are moved by a plan"
        done, chunk = self._report.layers_done, self._config.layers_per_chunk
        if done == len(self._plan.moves):
            self._end_move(self._plan)
            return
        layer, moves = self._plan.moves[done]
        transaction = LayerTransaction(mover=self._mover, cycle=self._cycle, layer=layer, moves=moves, switch=self._install)
        self._enter(Phase.MOVE, transaction, layer, pausing=chunk is not None and done > 0 and done % chunk == 0)

    def _commit(self) -> None:
        assert isinstance(self._activity, LayerTransaction), "only a layer can be committed"
        began = self._clock()
        self._activity.commit()
        self._report.longest_commit_s = max(self._report.longest_commit_s, self._clock() - began)
        self._report.layers_done += 1
        self._report.layers_moved += 1
        self._replaced = self._before_move

    def _install(self, layer: int) -> None:
        assert self._plan is not None, "layers are moved by a plan"
        self.location = self.location.with_layer(layer, self._plan.location.physical_to_logical[layer])
        self._switch(self.location, layer)

    def _end_move(self, plan: CyclePlan) -> None:
        self._report.move_s = self._clock() - self._move_began
        self._report.committed += 1
        self._serving.end_move(plan.busiest_bytes)
        self._log(
            "done in %.3f s: predicted cost %.3f s, measured %.3f s", self._report.move_s, plan.cost_s, self._serving.last_cost_s
        )
        self._finish()

    def _finish(self) -> None:
        self._report.last_abandoned = False
        self._num_forwards = 0
        self._serving.begin_window()
        self._enter(Phase.IDLE, None)

    def _abandon(self, verdict: Verdict, words: list[Word | None]) -> None:
        """On all ranks in the same step. What is under way comes to its end in DRAIN, and never into a slot."""
        if verdict.cause == Cause.OUT_OF_STEP:
            self._cycle = (max((word.cycle for word in words if word is not None), default=self._cycle) + 1) % (1 << CYCLE_BITS)
        if isinstance(self._activity, BackgroundPlan) and not self._activity.ended():
            self._stalled.append(self._activity)
        self._count_abandoned(verdict)
        self._num_forwards = 0
        self._serving.begin_window()
        self._enter(Phase.DRAIN, self._activity)

    def _count_abandoned(self, verdict: Verdict) -> None:
        self._report.abandoned += 1
        self._report.last_abandoned = True
        self._report.cause = f"{self._phase.name.lower()}: {verdict.text}"
        if self._phase == Phase.MOVE:
            self._report.cause = f"move of sparse layer {self._layer}: {verdict.text}"
        if self.rank == 0:
            logger.warning("rebalance %d abandoned in %s", self._cycle, self._report.cause)

    def _log(self, message: str, *values: object) -> None:
        if self.rank == 0:
            logger.info("rebalance %d: " + message, self._cycle, *values)


@dataclass
class _Report:
    """What the manager has counted and last seen: see RebalanceStatus."""

    committed: int = 0
    abandoned: int = 0
    skipped: int = 0
    layers_done: int = 0
    layers_total: int = 0
    layers_moved: int = 0
    last_abandoned: bool = False
    cause: str = ""
    skip_reason: str = ""
    quarantined_messages: int = 0
    plan_s: float = 0.0
    move_s: float = 0.0
    longest_commit_s: float = 0.0
    realised_gain_s: float = 0.0
