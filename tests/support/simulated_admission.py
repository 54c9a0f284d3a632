"""The real scheduler of a decode rank on simulated traffic, without a model.

Prompts come computed, as from a prefill instance; every request stops at a length drawn by chance that the scheduler does not know.
There is always one waiting, so memory is the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from engine_jobs import greedy_request

from moesaic.launch.engine.growth import Growth
from moesaic.launch.engine.scheduler import Scheduler, SchedulerConfig
from moesaic.launch.engine.sequence import Int64Array

RESERVED_TOKENS = 512
MAX_NEW_TOKENS = 2048
NUM_PAGES, PAGE_SIZE = 1200, 16


class FixedReserve(Growth):
    """So many tokens for each, or what it may still generate if that is less."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self._tokens = tokens

    def expected_tokens(self, remaining: Int64Array, produced: Int64Array, held: Int64Array) -> int:
        return int(np.minimum(remaining, self._tokens).sum())


def short_answers(rng: np.random.Generator, n: int) -> Int64Array:
    """Output lengths: median 120 tokens."""
    return np.clip(rng.lognormal(np.log(120), 0.8, n).astype(np.int64), 1, MAX_NEW_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`retracted`: per 100 requests. `running`: requests in a step on average. `usage`: of the pages."""

    steps: int
    retracted: float
    running: float
    usage: float


def simulate(growth: Growth, lengths: Int64Array, seed: int = 0) -> Outcome:
    """Serve requests of these output lengths, with prompts of 100 to 500 tokens, one after the other as memory allows."""
    rng = np.random.default_rng(seed)
    config = SchedulerConfig(num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_running=256, context_length=4096, chunk_tokens=2048)
    scheduler = Scheduler(config)
    scheduler.memory.growth = growth
    prompts = rng.integers(100, 500, len(lengths))
    arriving = iter(enumerate(zip(prompts.tolist(), lengths.tolist(), strict=True)))
    waiting = next(arriving, None)
    ends: dict[int, int] = {}
    steps, running, used = 0, 0, 0
    while waiting is not None or scheduler.has_work():
        while waiting is not None:
            rid, (prompt, length) = waiting
            tokens = [1 + rid, *range(prompt - 1)]  # nothing is shared
            sequence = scheduler.place(greedy_request(rid, tokens, MAX_NEW_TOKENS))
            if sequence is None:
                break
            scheduler.start_decoding(sequence, 0)
            ends[rid] = prompt + length
            waiting = next(arriving, None)
        _step(scheduler, ends)
        if waiting is not None:
            steps += 1
            running += scheduler.num_running
            used += scheduler.num_used_tokens
    return Outcome(
        steps=steps,
        retracted=100 * scheduler.num_retracted / len(lengths),
        running=running / steps,
        usage=used / steps / scheduler.capacity_tokens,
    )


def _step(scheduler: Scheduler, ends: dict[int, int]) -> None:
    launch = scheduler.launch(scheduler.schedule())
    for chunk in launch.plan.chunks:
        scheduler.settle_chunk(chunk)
    scheduler.settle_tokens(launch, np.zeros(len(launch.slots), dtype=np.int64))
    for slot in launch.slots.tolist():
        rid = int(scheduler.table.rid[slot])
        if scheduler.table.num_known[slot] >= ends[rid]:
            scheduler.finish(rid)
