"""A group of sequences that belong to one HTTP request (a batch, n > 1, or one): sent together, followed until all have
ended.

Whatever ends the group early (a client that left, a failure, a bug) aborts the rest of it on the ranks. Knows no API's
shape.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from moesaic.launch.engine.messages import RequestOutput, TokenLogprobs
from moesaic.launch.http.client import Arrivals
from moesaic.launch.http.detokenizer import Detokenizer
from moesaic.launch.http.errors import ApiError, EngineFailedError, bad_request, step_failed, transfer_failed, unavailable
from moesaic.launch.http.job import Job
from moesaic.launch.http.metrics import Metrics
from moesaic.launch.http.rooms import missing_room
from moesaic.launch.http.services import Services


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Why a sequence ended. `matched`: the stop string or stop token id."""

    kind: Literal["stop", "length", "abort"]
    matched: str | int | None = None
    message: str | None = None


@dataclass(kw_only=True)
class Generated:
    """One sequence: what has come of it so far. `index` is its place in the group."""

    index: int
    job: Job
    rid: int
    dp_rank: int
    detokenizer: Detokenizer | None
    started: float
    texts: list[str] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0
    finish: Finish | None = None
    last_at: float | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def latency(self) -> float:
        return time.monotonic() - self.started


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one step adds to one sequence. `first`: nothing came of this sequence before."""

    sequence: Generated
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    first: bool


class Run:
    """`with Run(services, jobs) as run: async for update in run.updates(): ...`. `limited`: the queue's limit counts."""

    def __init__(self, services: Services, jobs: Sequence[Job], *, limited: bool = True) -> None:
        self._services = services
        self._jobs = jobs
        self._limited = limited
        self._arrivals: Arrivals = asyncio.Queue()
        self._open: dict[int, Generated] = {}
        self.sequences: list[Generated] = []

    def __enter__(self) -> Self:
        config = self._services.config
        if config.role != "null" and any(job.bootstrap is None for job in self._jobs):
            raise bad_request(missing_room(config), "bootstrap_room")
        room = self._services.client.room() if self._limited else None
        if room is not None and len(self._jobs) > room:
            limit = self._services.config.max_queued_requests
            message = f"the queue is full: {len(self._jobs)} more would be over the limit of {limit}; try again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        try:
            for job in self._jobs:
                self._submit(job)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        for rid in self._open:
            self._services.client.abort(rid)
            self._services.metrics.num_aborted.inc()
            self._services.metrics.num_requests.inc()
            self._services.log.finished(self._open[rid])
        self._open.clear()

    def _submit(self, job: Job) -> None:
        started = time.monotonic()
        try:
            rid, dp_rank = self._services.client.submit(job.request(), job.name, self._arrivals, job.dp_rank)
        except EngineFailedError as error:
            raise unavailable(str(error)) from None
        except ValueError as error:
            raise bad_request(f"data_parallel_rank: {error}", "data_parallel_rank") from None
        sequence = Generated(
            index=len(self.sequences),
            job=job,
            rid=rid,
            dp_rank=dp_rank,
            detokenizer=self._detokenizer(job),
            started=started,
        )
        self.sequences.append(sequence)
        self._open[rid] = sequence
        self._services.log.received(sequence)

    def _detokenizer(self, job: Job) -> Detokenizer | None:
        if self._services.tokenizer is None:
            return None
        plan = job.plan
        return Detokenizer(
            self._services.tokenizer,
            plan.stops,
            skip_special_tokens=plan.skip_special_tokens,
            no_stop_trim=plan.no_stop_trim,
            min_tokens=plan.params.min_new_tokens,
        )

    async def updates(self) -> AsyncIterator[Update]:
        """Updates of all sequences in order of arrival, until all have ended.

        ApiError 503 when the engine fails, 500 when a step does that ran one of them, 400 or 502 to 504 when a transfer does.
        """
        while self._open:
            rid, output = await self._arrivals.get()
            sequence = self._open.get(rid)
            if isinstance(output, EngineFailedError):
                raise unavailable(str(output))
            if sequence is None:
                continue
            if output.transfer_failure:
                raise transfer_failed(output.transfer_failure, output.message or "the transfer failed")
            if output.failed:
                raise step_failed(output.message or "a step of the engine failed")
            update = _apply(sequence, output)
            _observe(self._services.metrics, update, output)
            if sequence.finish is not None:
                del self._open[rid]
                # The rank does not know of stop strings; for one that has ended by itself this does nothing.
                self._services.client.abort(rid, finish=True)
                self._services.log.finished(sequence)
            yield update

    async def finished(self) -> list[Generated]:
        """All sequences, ended."""
        async for _update in self.updates():
            pass
        return self.sequences


def _apply(sequence: Generated, output: RequestOutput) -> Update:
    """Take one step's output into the sequence."""
    first = sequence.last_at is None
    if first:
        sequence.cached_tokens = output.cached_tokens
    sequence.prompt_logprobs.extend(output.prompt_logprobs)
    text, used = _detokenize(sequence, output)
    token_ids, logprobs = output.token_ids[:used], output.logprobs[:used]
    if text:
        sequence.texts.append(text)
    sequence.output_ids.extend(token_ids)
    sequence.logprobs.extend(logprobs)
    return Update(sequence=sequence, text=text, token_ids=token_ids, logprobs=logprobs, first=first)


def _detokenize(sequence: Generated, output: RequestOutput) -> tuple[str, int]:
    """The text to add and the number of tokens used; sets `sequence.finish` when this is the end."""
    detokenizer = sequence.detokenizer
    if output.finish_reason is not None:
        sequence.finish = Finish(kind=output.finish_reason, matched=output.matched, message=output.message)
    if detokenizer is None:
        return "", len(output.token_ids)
    visible = output.token_ids
    if output.finish_reason == "stop" and not sequence.job.plan.no_stop_trim and visible[-1:] == (output.matched,):
        visible = visible[:-1]
    text, used = detokenizer.add(visible)
    if detokenizer.matched is None and sequence.finish is not None:
        text += detokenizer.end()
    if detokenizer.matched is not None:
        sequence.finish = Finish(kind="stop", matched=detokenizer.matched)
        return text, used
    return text, len(output.token_ids)


def _observe(metrics: Metrics, update: Update, output: RequestOutput) -> None:
    now = time.monotonic()
    sequence = update.sequence
    if update.first:
        metrics.prompt_tokens.inc(len(sequence.job.input_ids))
        metrics.cached_tokens.inc(sequence.cached_tokens)
        if update.token_ids:
            metrics.time_to_first_token.observe(now - sequence.started)
        if output.queue_seconds is not None:
            metrics.queue_time.observe(output.queue_seconds)
    elif update.token_ids and sequence.last_at is not None:
        step = (now - sequence.last_at) / len(update.token_ids)
        for _ in update.token_ids:
            metrics.inter_token_latency.observe(step)
    sequence.last_at = now
    metrics.generation_tokens.inc(len(update.token_ids))
    if sequence.finish is not None:
        metrics.num_requests.inc()
        metrics.e2e_latency.observe(now - sequence.started)
        if sequence.finish.kind == "abort":
            metrics.num_aborted.inc()
