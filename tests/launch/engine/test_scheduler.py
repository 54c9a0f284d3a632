"""The scheduler against random traffic, with the forward replaced by arbitrary tokens: its decisions don't depend on them."""

from __future__ import annotations

import random

import numpy as np
from engine_jobs import greedy_request

from moesaic.launch.engine.plan import Launch
from moesaic.launch.engine.scheduler import Scheduler, SchedulerConfig


def _step(scheduler: Scheduler, rng: random.Random) -> list[int]:
    """One step with random tokens; returns the requests that are complete."""
    plan = scheduler.schedule()
    assert plan.num_extend <= scheduler.config.chunk_tokens
    return _settle(scheduler, scheduler.launch(plan), rng)


def _settle(scheduler: Scheduler, launch: Launch, rng: random.Random) -> list[int]:
    """A launch's results are in, with random tokens; returns the requests that are complete."""
    for chunk in launch.plan.chunks:
        if chunk.sequence.slot >= 0:
            scheduler.settle_chunk(chunk)
    lives = scheduler.settle_tokens(launch, np.array([rng.randrange(50) for _ in launch.slots], dtype=np.int64))
    sequences = [scheduler.table.sequence(int(slot)) for slot in launch.slots[lives]]
    return [sequence.rid for sequence in sequences if sequence.num_tokens >= sequence.max_tokens]


def test_ten_thousand_requests_with_random_aborts_leak_no_page() -> None:
    rng = random.Random(0)
    config = SchedulerConfig(num_pages=80, page_size=4, max_running=24, context_length=256, chunk_tokens=64)
    scheduler = Scheduler(config)
    alive: set[int] = set()
    started = finished = aborted = 0
    while finished + aborted < 10_000:
        while started < 10_000 and len(alive) < 40:
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 60))]  # few different tokens: many shared prefixes
            scheduler.add(greedy_request(started, prompt, rng.randrange(1, 50)))
            alive.add(started)
            started += 1
        for rid in _step(scheduler, rng):
            assert scheduler.remove(rid) is not None
            alive.discard(rid)
            finished += 1
        if alive and rng.random() < 0.3:
            rid = rng.choice(sorted(alive))
            assert scheduler.remove(rid) is not None
            alive.discard(rid)
            aborted += 1
    assert not scheduler.has_work()
    assert scheduler.num_retracted > 100 and aborted > 1000, "the traffic must be rough enough to mean something"
    scheduler.cache.flush()
    assert scheduler.cache.allocator.num_free == config.num_pages


def test_two_schedulers_with_the_same_messages_stay_identical() -> None:
    """What lets the attention-TP ranks of a DP group schedule without talking to each other."""
    config = SchedulerConfig(num_pages=60, page_size=4, max_running=8, context_length=128, chunk_tokens=32)
    schedulers = [Scheduler(config), Scheduler(config)]
    rng = random.Random(1)
    for rid in range(200):
        request = greedy_request(rid, [rng.randrange(3) for _ in range(rng.randrange(1, 40))], rng.randrange(1, 20))
        done: list[list[int]] = []
        for scheduler in schedulers:
            scheduler.add(request)
            done.append(_step(scheduler, random.Random(rid)))
            for finished in done[-1]:
                scheduler.remove(finished)
        assert done[0] == done[1]
        first, second = schedulers
        assert (first.table.pages == second.table.pages).all()
        assert (first.table.num_tokens == second.table.num_tokens).all()


def test_decoding_goes_on_while_a_long_prompt_is_prefilled_in_chunks() -> None:
    scheduler = Scheduler(SchedulerConfig(num_pages=100, page_size=4, max_running=8, context_length=256, chunk_tokens=16))
    rng = random.Random(2)
    scheduler.add(greedy_request(1, [1, 2, 3], 50))
    _step(scheduler, rng)
    scheduler.add(greedy_request(2, [1] * 100, 5))
    for _ in range(6):
        plan = scheduler.schedule()
        assert plan.num_decode == 1 and plan.num_extend <= 16
        _settle(scheduler, scheduler.launch(plan), rng)
