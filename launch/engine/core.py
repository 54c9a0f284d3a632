"""The engine of one rank: messages in, one lockstep step at a time, outputs out. Knows no sockets and no processes.

Every rank of the instance calls `step` equally often; a rank without work takes part with zero rows.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moesaic.launch.engine.activity import Activity
from moesaic.launch.engine.batch import Batch, build_batch
from moesaic.launch.engine.messages import (
    AbortRequest,
    Control,
    ControlReply,
    GenerateRequest,
    LoadReport,
    RequestOutput,
    TokenLogprobs,
)
from moesaic.launch.engine.model_runner import ModelRunner
from moesaic.launch.engine.overlap_vote import SplitProposal, propose_split
from moesaic.launch.engine.plan import Chunk, Plan
from moesaic.launch.engine.rebalancing import Rebalancing
from moesaic.launch.engine.recording import LoadRecording
from moesaic.launch.engine.sampler import sample, token_logprobs
from moesaic.launch.engine.sampling_rows import sampling_batch
from moesaic.launch.engine.scheduler import Scheduler
from moesaic.launch.engine.sequence import MAX_TABLE_STOPS, Int64Array, Sequence
from moesaic.launch.engine.step import HeaderExchange, Step, StepHeader, StepRules, resolve_step
from moesaic.launch.models.deepseek_v3 import LoadObserver
from moesaic.launch.models.forward import ForwardInput, ForwardSplit

RequestMessage = GenerateRequest | AbortRequest


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step brought: the step all ranks agreed on, outputs for clients (as in `StepOutputs`), answers to commands."""

    step: Step
    outputs: list[RequestOutput]
    rids: list[int]
    tokens: list[int]
    replies: list[ControlReply]


class RankEngine:
    """Scheduler, model and sampler of one rank, in lockstep with the other ranks."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: ModelRunner,
        rules: StepRules,
        exchange: HeaderExchange,
        recording: LoadRecording,
        activity: Activity,
        rebalancing: Rebalancing | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._rules = rules
        self._exchange = exchange
        self._recording = recording
        self.activity = activity
        self._rebalancing = rebalancing
        if rebalancing is not None:
            activity.rebalance_status = rebalancing.manager.status
        self._controls: deque[Control] = deque()
        self._outputs: list[RequestOutput] = []
        self._rids: list[int] = []
        self._tokens: list[int] = []
        self._stop = False
        self._throughput = Throughput()

    def apply(self, message: RequestMessage) -> None:
        """Take in a request or an abort. A request that can never run is answered with an abort that says why."""
        if isinstance(message, AbortRequest):
            if self.scheduler.remove(message.rid) is not None and not message.finish:
                self._outputs.append(RequestOutput(rid=message.rid, token_ids=(), finish_reason="abort"))
            return
        try:
            self.scheduler.add(message)
        except ValueError as error:
            self._outputs.append(RequestOutput(rid=message.rid, token_ids=(), finish_reason="abort", message=str(error)))

    def control(self, command: Control) -> None:
        """Queue a command; it is carried out in the step in which every rank has it."""
        self._controls.append(command)

    def step(self, num_messages: int = 0) -> StepResult:
        """One lockstep step. `num_messages`: see StepHeader. Collective."""
        self.activity.step += 1
        self.activity.enter("scheduling")
        plan = self.scheduler.schedule()
        proposal = propose_split(plan, self._rules.distribution_threshold) if self._rules.splits else SplitProposal()
        manager = None if self._rebalancing is None else self._rebalancing.manager
        header = StepHeader(
            num_decode=plan.num_decode,
            num_extend=plan.num_extend,
            num_logits=plan.num_logits,
            num_messages=num_messages,
            first_tokens=proposal.first_tokens,
            first_logits=proposal.first_logits,
            control=self._controls[0].control_id if self._controls else 0,
            rebalance=0 if manager is None else manager.word(),
            has_work=self.scheduler.has_work() or (manager is not None and manager.busy),
            stop=self._stop,
        )
        self.activity.enter("step header exchange")
        headers = self._exchange.exchange(header)
        step = resolve_step(headers, self._rules)
        if manager is not None:
            self.activity.enter("rebalance")
            manager.advance([header.rebalance for header in headers], forward=not step.idle)
        if not step.idle:
            self._run(plan, step)
        replies = [self._carry_out(self._controls.popleft())] if step.control else []
        result = StepResult(step=step, outputs=self._outputs, rids=self._rids, tokens=self._tokens, replies=replies)
        self._outputs, self._rids, self._tokens = [], [], []
        return result

    def load(self, dp_rank: int) -> LoadReport:
        """The scheduler's state now."""
        scheduler = self.scheduler
        return LoadReport(
            dp_rank=dp_rank,
            num_running_reqs=scheduler.num_running,
            num_waiting_reqs=scheduler.num_waiting,
            num_used_tokens=scheduler.num_used_tokens,
            max_total_num_tokens=scheduler.capacity_tokens,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            gen_throughput=self._throughput.tokens_per_s(),
            cache_hit_rate=scheduler.cache.counters.hit_rate,
            num_retracted_reqs=scheduler.num_retracted,
        )

    def _run(self, plan: Plan, step: Step) -> None:
        self.activity.enter(f"forward ({step.plan.mode.value} dispatch)")
        device = torch.device(self.runner.config.device)
        batch = build_batch(plan, self.scheduler.table, self.runner.config.page_size, device)
        inputs = ForwardInput(
            input_ids=batch.input_ids,
            metadata=batch.metadata,
            plan=step.plan,
            logit_rows=batch.logit_rows,
            num_logits_per_dp_rank=step.num_logits,
        )
        logits = self.runner.forward(inputs, self._observer(), self._split(inputs, step))
        self._recording.end_step(sum(step.num_tokens), "extend" if step.extends else "decode", batch.metadata.positions)
        self.activity.enter("sampling")
        self._advance(plan, batch, logits)

    def _split(self, inputs: ForwardInput, step: Step) -> ForwardSplit | None:
        """The two micro-batches that all ranks voted for."""
        if step.split is None:
            return None
        cut = step.split.num_tokens[0][self._recording.dp_rank]
        first, second = inputs.split(cut, step.split.plans, step.split.num_logits)
        return ForwardSplit(first=first, second=second, extends=step.extends)

    def _observer(self) -> LoadObserver | None:
        """Whoever counts the choices of this step's tokens."""
        recorder, rebalancing = self._recording.observer, self._rebalancing
        if recorder is None or rebalancing is None:
            return recorder if rebalancing is None else rebalancing.observe

        def both(layer_index: int, topk_ids: Tensor) -> None:
            recorder(layer_index, topk_ids)
            rebalancing.observe(layer_index, topk_ids)

        return both

    def _advance(self, plan: Plan, batch: Batch, logits: Tensor) -> None:
        """Sample, hand the tokens to the scheduler, and write the outputs."""
        row = batch.num_sampled
        for chunk in plan.chunks:
            wanted = len(chunk.prompt_rows())
            self._collect_prompt_logprobs(chunk, logits[row : row + wanted])
            row += wanted
            self.scheduler.advance_chunk(chunk)
        completed = [chunk.sequence.slot for chunk in plan.chunks if chunk.completes]
        slots = np.concatenate([plan.decode_slots, np.array(completed, dtype=np.int64)])
        if not len(slots):
            return
        sampled = logits[: batch.num_sampled]
        tokens = sample(sampled, sampling_batch(slots, self.scheduler.table, logits.device))
        logprobs = self._logprobs(slots, sampled, tokens)
        chosen: Int64Array = tokens.cpu().numpy()
        self.scheduler.append_tokens(slots, chosen)
        self._throughput.add(len(slots))
        self._emit(slots, chosen, logprobs)

    def _emit(self, slots: Int64Array, tokens: Int64Array, logprobs: dict[int, TokenLogprobs]) -> None:
        """Sort the new tokens into those that just continue a sequence and those that need an output of their own."""
        table = self.scheduler.table
        event = (table.num_tokens[slots] >= table.max_tokens[slots]) | table.needs_event[slots]
        event |= (table.stop_ids[slots] == tokens[:, None]).any(axis=1)
        self._rids = table.rid[slots[~event]].tolist()
        self._tokens = tokens[~event].tolist()
        for row in np.flatnonzero(event).tolist():
            self._emit_event(table.sequence(int(slots[row])), int(tokens[row]), logprobs.get(row))

    def _emit_event(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        """The output of a token that is a sequence's first or last or comes with logprobs; ends a complete sequence."""
        limit = sequence.request.sampling.max_new_tokens
        finish: Literal["stop", "length"] | None = None
        if limit and token in sequence.stop_ids:
            finish = "stop"
        elif sequence.num_tokens >= sequence.max_tokens:
            finish = "length"
        first = not sequence.first_output_sent
        sequence.first_output_sent = True
        many_stops = len(sequence.stop_ids) > MAX_TABLE_STOPS
        self.scheduler.table.needs_event[sequence.slot] = sequence.request.return_logprob or many_stops
        self._outputs.append(
            RequestOutput(
                rid=sequence.rid,
                token_ids=(token,) if limit else (),
                finish_reason=finish,
                matched=token if finish == "stop" else None,
                cached_tokens=sequence.cached_tokens,
                logprobs=(logprobs,) if logprobs is not None and limit else (),
                prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
                queue_seconds=sequence.admitted_at - sequence.added_at if first else None,
            )
        )
        if finish is not None:
            self.scheduler.remove(sequence.rid)

    def _logprobs(self, slots: Int64Array, logits: Tensor, tokens: Tensor) -> dict[int, TokenLogprobs]:
        """Logprobs of the rows that asked for them, by row."""
        table = self.scheduler.table
        rows = np.flatnonzero(table.wants_logprobs[slots]).tolist()
        if not rows:
            return {}
        requests = [table.sequence(int(slots[row])).request for row in rows]
        found = _gather_logprobs(logits[rows], tokens[rows], [request.top_logprobs_num for request in requests])
        return dict(zip(rows, found, strict=True))

    def _collect_prompt_logprobs(self, chunk: Chunk, logits: Tensor) -> None:
        sequence = chunk.sequence
        request = sequence.request
        if request.logprob_start_len < 0 or sequence.first_output_sent:
            return
        if request.logprob_start_len == 0 and chunk.start == 0:
            sequence.prompt_logprobs.append(TokenLogprobs(token_id=int(sequence.tokens[0]), logprob=None))
        positions = chunk.prompt_rows()
        if len(positions):
            tokens = torch.from_numpy(sequence.tokens[positions.start + 1 : positions.stop + 1].astype(np.int64))
            tops = [request.top_logprobs_num] * len(positions)
            sequence.prompt_logprobs += _gather_logprobs(logits, tokens.to(logits.device), tops)

    def _carry_out(self, command: Control) -> ControlReply:
        """A control command, in the same step on every rank."""
        message, ok = "", True
        if command.command == "rebalance":
            message, ok = self._start_rebalance()
        elif command.command == "flush_cache":
            message = f"{self.scheduler.cache.flush()} pages freed"
        elif command.command == "shutdown":
            self._stop = True
        else:
            message = self._recording.carry_out(command.command)
        return ControlReply(control_id=command.control_id, dp_rank=self._recording.dp_rank, ok=ok, message=message)

    def _start_rebalance(self) -> tuple[str, bool]:
        """(what to tell the client, whether a cycle begins)."""
        if self._rebalancing is None:
            return "experts do not move here: start the server with --enable-eplb", False
        if self._rebalancing.manager.busy:
            return "a rebalance is under way", False
        self._rebalancing.manager.start_now()
        return "rebalancing", True


class Throughput:
    """Generated tokens per second over about the last second."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._tokens = 0
        self._rate = 0.0

    def add(self, num_tokens: int) -> None:
        self._tokens += num_tokens
        elapsed = time.monotonic() - self._since
        if elapsed >= 1.0:
            self._rate = self._tokens / elapsed
            self._tokens, self._since = 0, time.monotonic()

    def tokens_per_s(self) -> float:
        """0 when nothing was generated for some seconds."""
        return self._rate if time.monotonic() - self._since < 5.0 else 0.0


def _gather_logprobs(logits: Tensor, tokens: Tensor, top_nums: list[int]) -> list[TokenLogprobs]:
    """Logits [N, V] and tokens [N] -> each row's logprob and its own number of top ones."""
    logprob, values, ids = token_logprobs(logits, tokens, max(top_nums, default=0))
    rows = zip(tokens.tolist(), logprob.tolist(), values.tolist(), ids.tolist(), top_nums, strict=True)
    return [
        TokenLogprobs(token_id=token, logprob=own, top=[(top_ids[i], top_values[i]) for i in range(count)])
        for token, own, top_values, top_ids, count in rows
    ]
