"""What a step's outcome means for the requests: tokens, ends, outputs for clients. Knows no model and no collectives."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np

from moesaic.attention.page_allocator import PageArray
from moesaic.launch.engine.messages import RequestOutput, TokenLogprobs, every_output
from moesaic.launch.engine.plan import Chunk, Launch
from moesaic.launch.engine.scheduler import Scheduler
from moesaic.launch.engine.sequence import MAX_TABLE_STOPS, Int64Array, Sequence
from moesaic.launch.engine.step_job import StepJob, StepOutcome


class Results:
    """Settles launches in the scheduler and gathers the outputs (as in `StepOutputs`) until they are sent."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.throughput = Throughput()
        self._outputs: list[RequestOutput] = []
        self._rids: list[int] = []
        self._tokens: list[int] = []

    def take(self) -> tuple[list[RequestOutput], list[int], list[int]]:
        """outputs, rids and tokens to be sent now, removed. Nothing in `outputs` comes after the tokens of a request in `rids`."""
        taken = (self._outputs, self._rids, self._tokens)
        self._outputs, self._rids, self._tokens = [], [], []
        return taken

    def abort(self, rid: int, message: str | None = None, *, failed: bool = False) -> None:
        """A request ends without having finished."""
        self._outputs.append(RequestOutput(rid=rid, token_ids=(), finish_reason="abort", message=message, failed=failed))

    def settle(self, launch: Launch, job: StepJob, outcome: StepOutcome) -> PageArray:
        """A step's outcome that all ranks may use. Returns freed pages whose KV must be cleared, int32 [P]."""
        self._close_step()
        bad = outcome.bad_rows
        spoiled = self._drop(launch.slots[bad], launch.owners[bad], "the model gave logits with NaN or inf for this request")
        for chunk in launch.plan.chunks:
            if chunk.sequence.slot >= 0:
                _collect_first(chunk)
                self._scheduler.settle_chunk(chunk)
        for wanted, found in zip(job.prompt_logprobs, outcome.prompt_logprobs, strict=True):
            wanted.chunk.sequence.prompt_logprobs += found.messages()
        if not len(launch.slots):
            return spoiled
        logprobs: dict[int, TokenLogprobs] = {}
        if job.sampled_logprobs is not None and outcome.sampled_logprobs is not None:
            logprobs = dict(zip(job.sampled_logprobs.rows, outcome.sampled_logprobs.messages(), strict=True))
        lives = self._scheduler.settle_tokens(launch, outcome.tokens)
        self.throughput.add(int(lives.sum()))
        self._emit(launch, np.flatnonzero(lives), outcome.tokens, logprobs)
        return spoiled

    def fail(self, launch: Launch, message: str) -> PageArray:
        """The step failed: all its requests end, and nothing of their KV is kept. Returns the freed pages, int32 [P]."""
        self._close_step()
        decode = launch.plan.num_decode
        running = [chunk.sequence.slot for chunk in launch.plan.chunks if chunk.sequence.slot >= 0]
        chunk_slots = np.array(running, dtype=np.int64)
        slots = np.concatenate([launch.slots[:decode], chunk_slots])
        owners = np.concatenate([launch.owners[:decode], self._scheduler.table.owner[chunk_slots]])
        return self._drop(slots, owners, message)

    def _close_step(self) -> None:
        """The tokens of the step settled before this one, if they have not been sent, come before what this one brings."""
        self._outputs = list(every_output(self._outputs, self._rids, self._tokens))
        self._rids, self._tokens = [], []

    def _drop(self, slots: Int64Array, owners: Int64Array, message: str) -> PageArray:
        """End, as failed, those of the requests in these slots that still run."""
        table = self._scheduler.table
        freed: list[PageArray] = []
        for slot in slots[table.owner[slots] == owners].tolist():
            rid = table.sequence(slot).rid
            freed.append(self._scheduler.drop(rid))
            self.abort(rid, message, failed=True)
        return np.concatenate(freed) if freed else np.empty(0, dtype=np.int32)

    def _emit(self, launch: Launch, rows: Int64Array, tokens: Int64Array, logprobs: dict[int, TokenLogprobs]) -> None:
        """Sort the tokens of `rows` into those that just continue a sequence and those that need an output of their own."""
        table = self._scheduler.table
        slots, ends = launch.slots[rows], launch.positions[rows] + 1 >= table.max_tokens[launch.slots[rows]]
        event = ends | table.needs_event[slots]
        event |= (table.stop_ids[slots] == tokens[rows, None]).any(axis=1)
        self._rids = table.rid[slots[~event]].tolist()
        self._tokens = tokens[rows[~event]].tolist()
        for place in np.flatnonzero(event).tolist():
            row = int(rows[place])
            self._emit_event(table.sequence(int(slots[place])), int(tokens[row]), bool(ends[place]), logprobs.get(row))

    def _emit_event(self, sequence: Sequence, token: int, ends: bool, logprobs: TokenLogprobs | None) -> None:
        """The output of a token that is a sequence's first or last or comes with logprobs; ends a complete sequence."""
        limit = sequence.request.sampling.max_new_tokens
        finish: Literal["stop", "length"] | None = "length" if ends else None
        if limit and token in sequence.stop_ids:
            finish = "stop"
        first = not sequence.first_output_sent
        sequence.first_output_sent = True
        many_stops = len(sequence.stop_ids) > MAX_TABLE_STOPS
        self._scheduler.table.needs_event[sequence.slot] = sequence.request.return_logprob or many_stops
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
            self._scheduler.remove(sequence.rid)


def _collect_first(chunk: Chunk) -> None:
    """The prompt's first token has no logprob, as no row predicts it."""
    sequence = chunk.sequence
    if sequence.request.logprob_start_len == 0 and chunk.start == 0 and not sequence.first_output_sent:
        sequence.prompt_logprobs.append(TokenLogprobs(token_id=int(sequence.tokens[0]), logprob=None))


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
