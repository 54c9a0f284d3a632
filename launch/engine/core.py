"""The engine of one rank: messages in, one lockstep step at a time, outputs out. Knows no sockets and no processes.

Every rank of the instance calls `step` equally often; a rank without work takes part with zero rows.

Overlapped scheduling: a call schedules and launches step n + 1 while the forward of step n runs, then brings in the results of step
n (stops, outputs, freed pages), which the call after it schedules with. So the CPU's work is hidden behind forwards, and a token
goes out as soon as its forward is done. Whether a call leaves its step under way follows from what all ranks know alike.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesaic.eplb.forward_mode import ForwardMode
from moesaic.kernels.gpu import upload
from moesaic.launch.engine.activity import Activity
from moesaic.launch.engine.batch import build_batch
from moesaic.launch.engine.controls import Controls
from moesaic.launch.engine.logprob_rows import wanted_of_prompts, wanted_of_sampled
from moesaic.launch.engine.messages import (
    AbortRequest,
    Control,
    ControlReply,
    GenerateRequest,
    LoadReport,
    RequestOutput,
    every_output,
)
from moesaic.launch.engine.model_runner import ModelRunner
from moesaic.launch.engine.overlap_vote import SplitProposal, propose_split
from moesaic.launch.engine.pipeline import Pipeline
from moesaic.launch.engine.plan import Launch, Plan
from moesaic.launch.engine.profiling import Profiling
from moesaic.launch.engine.rebalancing import Rebalancing
from moesaic.launch.engine.recording import LoadRecording
from moesaic.launch.engine.results import Results
from moesaic.launch.engine.retraction import HostKeeper
from moesaic.launch.engine.rooms import Rooms
from moesaic.launch.engine.sampling_rows import sampling_rows
from moesaic.launch.engine.scheduler import Scheduler
from moesaic.launch.engine.step import HeaderExchange, Step, StepHeader, StepRules, resolve_step
from moesaic.launch.engine.step_job import StepJob
from moesaic.launch.models.deepseek_v3 import LoadObserver
from moesaic.launch.models.forward import ForwardInput, ForwardSplit

RequestMessage = GenerateRequest | AbortRequest


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one call of `step` brought: the step that all ranks agreed on and launched, and whatever is to be sent now: outputs for
    clients (as in `StepOutputs`), of this step or of the one before, and answers to commands.
    """

    step: Step
    outputs: list[RequestOutput]
    rids: list[int]
    tokens: list[int]
    replies: list[ControlReply]


class RankEngine:
    """Scheduler, model and sampler of one rank, in lockstep with the other ranks. Put together in assembly.py."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: ModelRunner,
        rules: StepRules,
        exchange: HeaderExchange,
        recording: LoadRecording,
        activity: Activity,
        pipeline: Pipeline,
        results: Results,
        controls: Controls,
        profiling: Profiling,
        rebalancing: Rebalancing | None = None,
        overlap_schedule: bool = True,
        keeper: HostKeeper | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.results = results
        self.activity = activity
        self._keeper = keeper
        self._rooms: Rooms | None = None
        self._rules = rules
        self._exchange = exchange
        self._recording = recording
        self._pipeline = pipeline
        self._controls = controls
        self._profiling = profiling
        self._rebalancing = rebalancing
        self._manager = None if rebalancing is None else rebalancing.manager
        if self._manager is not None:
            activity.rebalance_status = self._manager.status
        self._overlaps = overlap_schedule
        first = runner.parallel.dp_rank * rules.attn_tp_size
        self._group = slice(first, first + rules.attn_tp_size)
        self._device = torch.device(runner.config.device)
        self._commands: deque[Control] = deque()

    def attach(self, rooms: Rooms) -> None:
        """From now on this is an instance with a role. Before the first step."""
        self._rooms = self.results.rooms = rooms

    def apply(self, message: RequestMessage) -> None:
        """Take in a request or an abort. A request that can never run is answered with an abort that says why."""
        if isinstance(message, AbortRequest):
            self._abort(message)
            return
        try:
            if self._rooms is None:
                self.scheduler.add(message)
            else:
                self._rooms.take(message)
        except ValueError as error:
            self.results.abort(message.rid, str(error))

    def _abort(self, message: AbortRequest) -> None:
        found = self._rooms is not None and self._rooms.abort(message.rid)
        if not found:
            end = self.scheduler.finish if message.finish else self.scheduler.remove
            found = end(message.rid) is not None
        if found and not message.finish:
            self.results.abort(message.rid)

    def control(self, command: Control) -> None:
        """Queue a command; it is carried out in the step in which every rank has it."""
        self._commands.append(command)

    def advance_rooms(self) -> list[RequestOutput]:
        """Before a step, in a DP group of one rank: nobody's word but its own is needed, so rooms move on at once, and a sequence
        that has come decodes in this step. Returns what is to be sent now, its first token for one: a forward is long.
        """
        if self._rooms is None or self._rules.attn_tp_size > 1 or not self._rooms.num_open:
            return []
        self._settle_rooms(self._rooms, [self._rooms.word()])
        outputs, rids, tokens = self.results.take()
        return list(every_output(outputs, rids, tokens))

    def _settle_rooms(self, rooms: Rooms, words: list[int]) -> None:
        self._pipeline.clear_spoiled_pages(self._device)
        rooms.settle(words, forward_runs=bool(self._pipeline))

    def step(self, num_messages: int = 0) -> StepResult:
        """One lockstep step. `num_messages`: see StepHeader. Collective. Raises whatever ends this rank."""
        self.activity.step += 1
        self.activity.enter("scheduling")
        plan = self._schedule()
        header = self._header(plan, num_messages)
        self.activity.enter("step header exchange")
        headers = self._exchange.exchange(header)
        step = resolve_step(headers, self._rules)
        if self._manager is not None:
            self.activity.enter("rebalance")
            self._manager.advance([header.rebalance for header in headers], forward=not step.idle)
        if not step.idle:
            self.activity.enter("launch")
            self._pipeline.launch(*self._job(plan, step))
        replies = self._carry_out() if step.control else []
        self._pipeline.collect(leave=1 if self._leaves_under_way(step) else 0)
        if self._rooms is not None and self._rules.attn_tp_size > 1:
            self._settle_rooms(self._rooms, [header.rooms for header in headers[self._group]])
        outputs, rids, tokens = self.results.take()
        return StepResult(step=step, outputs=outputs, rids=rids, tokens=tokens, replies=replies)

    def load(self, dp_rank: int) -> LoadReport:
        """The scheduler's state now."""
        scheduler, rooms = self.scheduler, self._rooms
        num_unplaced, unplaced_tokens = (0, 0) if rooms is None else rooms.num_unplaced()
        return LoadReport(
            dp_rank=dp_rank,
            num_running_reqs=scheduler.num_running,
            num_waiting_reqs=scheduler.num_waiting + num_unplaced,
            num_used_tokens=scheduler.num_used_tokens,
            max_total_num_tokens=scheduler.capacity_tokens,
            num_waiting_tokens=scheduler.num_waiting_tokens + unplaced_tokens,
            gen_throughput=self.results.throughput.tokens_per_s(),
            cache_hit_rate=scheduler.cache.counters.hit_rate,
            num_retracted_reqs=scheduler.num_retracted,
            rooms=None if rooms is None else rooms.load(),
            retraction=None if self._keeper is None else self._keeper.load,
        )

    def close(self) -> None:
        """No more steps; what is under way runs to its end."""
        self._pipeline.close()

    def _leaves_under_way(self, step: Step) -> bool:
        """Whether the step just launched runs on while this call returns. The same on all ranks.

        Not while a rebalance may need the time between two forwards, where counts are taken and weights change.
        """
        return self._overlaps and not step.idle and not step.stop and (self._manager is None or self._manager.calm)

    def _schedule(self) -> Plan:
        if self._pipeline and self.scheduler.must_retract():
            self._pipeline.collect()
            self.activity.enter("scheduling")
        return self.scheduler.schedule()

    def _header(self, plan: Plan, num_messages: int) -> StepHeader:
        manager = self._manager
        proposal = propose_split(plan, self._rules.distribution_threshold) if self._rules.splits else SplitProposal()
        return StepHeader(
            num_decode=plan.num_decode,
            num_extend=plan.num_extend,
            num_logits=plan.num_logits,
            num_messages=num_messages,
            first_tokens=proposal.first_tokens,
            first_logits=proposal.first_logits,
            control=self._commands[0].control_id if self._commands else 0,
            rebalance=0 if manager is None else manager.word(),
            rooms=0 if self._rooms is None or self._rules.attn_tp_size == 1 else self._rooms.word(),
            has_work=self._has_work(),
            stop=self._controls.stop,
        )

    def _has_work(self) -> bool:
        rooms, manager = self._rooms, self._manager
        open_rooms = rooms is not None and rooms.num_open > 0
        return self.scheduler.has_work() or bool(self._pipeline) or open_rooms or (manager is not None and manager.busy)

    def _carry_out(self) -> list[ControlReply]:
        self._pipeline.collect()
        command = self._commands.popleft()
        self.activity.enter(f"command {command.command}")
        return [self._controls.carry_out(command)]

    def _job(self, plan: Plan, step: Step) -> tuple[Launch, StepJob]:
        """Launch the plan in the scheduler, and say what the worker has to do for it."""
        table, device = self.scheduler.table, self._device
        batch = build_batch(plan, table, self.runner.config.page_size, device, one_bucket=step.graph is not None)
        inputs = ForwardInput(
            input_ids=batch.input_ids,
            metadata=batch.metadata,
            plan=step.plan,
            logit_rows=batch.logit_rows,
            num_logits_per_dp_rank=step.num_logits,
        )
        prompt_logprobs = wanted_of_prompts(plan, device)
        launch = self.scheduler.launch(plan)
        known_slots, known_tokens = self.scheduler.take_known_tokens()
        mode: ForwardMode = "prefill" if step.extends else "decode"
        job = StepJob(
            step=self.activity.step,
            mode=mode,
            num_tokens=sum(step.num_tokens),
            inputs=inputs,
            split=self._split(inputs, batch.host_logit_rows, step),
            graph=step.graph,
            decode_slots=upload(torch.from_numpy(plan.decode_slots), device),
            sampled_slots=upload(torch.from_numpy(launch.slots), device),
            known_slots=upload(torch.from_numpy(known_slots), device),
            known_tokens=upload(torch.from_numpy(known_tokens), device),
            sampling=sampling_rows(launch.slots, launch.positions, table, device),
            sampled_logprobs=wanted_of_sampled(launch.slots, table, device),
            prompt_logprobs=prompt_logprobs,
            spoiled_pages=self._pipeline.take_spoiled_pages(device),
            restoration=self.scheduler.take_restoration(),
            observer=self._observer(mode),
            recording=self._recording,
            timeline=self._profiling.launch_step(),
        )
        return launch, job

    def _split(self, inputs: ForwardInput, host_logit_rows: Tensor, step: Step) -> ForwardSplit | None:
        """The two micro-batches that all ranks voted for. Rows are told apart on the CPU, for a device would be waited for."""
        if step.split is None:
            return None
        cut = step.split.num_tokens[0][self._recording.dp_rank]
        halves = replace(inputs, logit_rows=host_logit_rows).split(cut, step.split.plans, step.split.num_logits)
        first, second = (replace(half, logit_rows=upload(half.logit_rows, self._device)) for half in halves)
        return ForwardSplit(first=first, second=second, extends=step.extends)

    def _observer(self, mode: ForwardMode) -> LoadObserver | None:
        """Whoever counts the choices of this step's tokens."""
        recorder = self._recording.observer
        counter = None if self._rebalancing is None else self._rebalancing.observer(mode)
        if recorder is None or counter is None:
            return recorder or counter

        def both(layer_index: int, topk_ids: Tensor) -> None:
            recorder(layer_index, topk_ids)
            counter(layer_index, topk_ids)

        return both
