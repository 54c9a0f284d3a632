"""KV of retracted sequences in host memory: what is computed from it is what would have been computed anyway."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from engine_jobs import ALWAYS_KEEP, EngineSettings, greedy_request, make_runner
from tiny_models import TinyModel

from moesaic.attention.host_pool import HostKVPool
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.launch.engine.plan import Launch
from moesaic.launch.engine.retraction import HostKeeper, RetractionCosts
from moesaic.launch.engine.retraction_costs import measure_costs
from moesaic.launch.engine.scheduler import Scheduler, SchedulerConfig
from moesaic.launch.engine.step import StepRules

PAGE_SIZE = 4


class _Rank:
    """The real scheduler and real pools; the forward writes each token's id into its row, and first looks at the rows before it."""

    def __init__(self, *, num_pages: int, num_host_pages: int, prefix_cache: bool) -> None:
        self.pool = LatentKVPool(
            num_layers=2, num_pages=num_pages, page_size=PAGE_SIZE, latent_dim=1, dtype=torch.float32, device=torch.device("cpu")
        )
        self.host = HostKVPool(self.pool, num_host_pages)
        self.keeper = HostKeeper(self.host, ALWAYS_KEEP, PAGE_SIZE)
        config = SchedulerConfig(
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            max_running=12,
            context_length=128,
            chunk_tokens=32,
            prefix_cache=prefix_cache,
            growth_tokens=4,
        )
        self.scheduler = Scheduler(config, self.keeper)
        self.num_checked = 0

    def step(self, rng: random.Random) -> list[int]:
        """Returns the requests that are complete."""
        scheduler, table = self.scheduler, self.scheduler.table
        launch = scheduler.launch(scheduler.schedule())
        restoration = scheduler.take_restoration()
        if restoration is not None:
            self.host.load(restoration.host_pages, restoration.pages)
        scheduler.take_known_tokens()
        self._forward(launch)
        for chunk in launch.plan.chunks:
            scheduler.settle_chunk(chunk)
        lives = scheduler.settle_tokens(launch, np.array([rng.randrange(50) for _ in launch.slots], dtype=np.int64))
        assert lives.all()
        sequences = [table.sequence(slot) for slot in launch.slots.tolist()]
        return [sequence.rid for sequence in sequences if sequence.num_tokens >= sequence.max_tokens]

    def _forward(self, launch: Launch) -> None:
        table = self.scheduler.table
        for slot in launch.plan.decode_slots.tolist():
            self._compute(slot, int(table.num_known[slot]) - 1, 1)
        for chunk in launch.plan.chunks:
            self._compute(chunk.sequence.slot, chunk.start, chunk.length)

    def _compute(self, slot: int, start: int, length: int) -> None:
        table, at = self.scheduler.table, np.arange(start + length)
        rows = torch.from_numpy(table.pages[slot, at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE).long()
        tokens = torch.from_numpy(table.tokens[slot, at]).float() + 1
        for layer in range(2):
            kv = self.pool.rows(layer)[:, 0]
            assert torch.equal(kv[rows[:start]], tokens[:start] + layer), "KV of another token"
            kv[rows[start:]] = tokens[start:] + layer
        self.num_checked += 1


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("num_host_pages", [6, 60])
def test_every_token_meets_its_own_kv_under_rough_traffic(prefix_cache: bool, num_host_pages: int) -> None:
    """Shared prefixes, aborts at any time, more retracted than host memory holds, or less."""
    rng = random.Random(3)
    rank = _Rank(num_pages=40, num_host_pages=num_host_pages, prefix_cache=prefix_cache)
    scheduler, alive = rank.scheduler, set[int]()
    for rid in range(400):
        scheduler.add(greedy_request(rid, [rng.randrange(2) for _ in range(rng.randrange(1, 24))], rng.randrange(1, 60)))
        alive.add(rid)
        while len(alive) >= 16 or (rid == 399 and alive):
            for done in rank.step(rng):
                scheduler.finish(done)
                alive.discard(done)
            if alive and rng.random() < 0.02:
                aborted = rng.choice(sorted(alive))
                scheduler.remove(aborted)
                alive.discard(aborted)

    load = rank.keeper.load
    assert rank.num_checked > 5000 and load.num_offloaded_reqs > 50 and load.num_restored_tokens > 500
    assert (load.num_host_full_reqs > 0) == (num_host_pages == 6)
    assert scheduler.num_retracted >= load.num_offloaded_reqs + load.num_host_full_reqs
    assert not scheduler.has_work() and load.num_host_tokens == 0
    scheduler.cache.flush()
    assert scheduler.cache.allocator.num_free == 40


def test_the_cheaper_way_is_taken() -> None:
    """16 tokens in 4 pages: 40 ms to copy them there and back."""
    for recompute_ms_per_token, copies in ((3.0, True), (2.0, False)):
        costs = RetractionCosts(copy_s_per_page=0.010, recompute_s_per_token=recompute_ms_per_token / 1e3)
        assert costs.favour_copy(4, 16) == copies


@pytest.fixture
def keeper() -> Iterator[HostKeeper]:
    rank = _Rank(num_pages=8, num_host_pages=3, prefix_cache=False)
    yield rank.keeper
    assert rank.host.num_free == 3


def test_full_host_memory_is_counted_and_told_once_until_there_is_room(
    keeper: HostKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    pages = np.arange(2, dtype=np.int32)
    with caplog.at_level(logging.WARNING):
        kept = keeper.keep(pages, 7)
        assert kept is not None
        assert keeper.keep(pages, 7) is None and keeper.keep(pages, 7) is None
        assert [record.getMessage() for record in caplog.records] == [
            "host memory for the KV of retracted requests is full (12 tokens): what is retracted now is computed again; "
            "--disaggregation-host-kv-gb allows more"
        ]
        keeper.forget(kept)
        again = keeper.keep(pages, 7)
        assert again is not None and keeper.keep(pages, 7) is None
        keeper.forget(again)
    assert len(caplog.records) == 2
    assert (keeper.load.num_offloaded_reqs, keeper.load.num_offloaded_tokens, keeper.load.num_host_full_reqs) == (2, 14, 3)


def test_costs_are_measured_where_nobody_is_disturbed(tiny: Callable[..., TinyModel]) -> None:
    runner = make_runner(EngineSettings(model_path=str(tiny("plain").folder), num_pages=32, num_host_pages=16))
    assert runner.host_kv is not None
    sizes = SchedulerConfig(num_pages=32, page_size=4, max_running=8, context_length=256, chunk_tokens=32)
    for chunk_tokens in (32, 1):
        rules = StepRules(attn_tp_size=1, a2a=False, mode="auto", cap=64)
        sizes = SchedulerConfig(num_pages=32, page_size=4, max_running=8, context_length=256, chunk_tokens=chunk_tokens)
        costs = measure_costs(runner, runner.host_kv, rules, sizes)

        assert 0 < costs.copy_s_per_page < 0.1 and 0 < costs.recompute_s_per_token < 1
    assert runner.host_kv.num_free == 16
