"""The sizes from which steps are split: measured alike on all ranks, or told by rank 0; and nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_jobs import EngineSettings, Finished, greedy_request, make_engine, merged, run_waves
from rank_pool import RankPool
from tiny_models import TinyModel

from moesaic.attention.metadata import AttentionMetadata
from moesaic.launch.engine.calibration import Calibration, settle_profile
from moesaic.launch.engine.messages import GenerateRequest, OverlapProfile, Ready, encoder, from_rank_decoder
from moesaic.launch.engine.rank_spec import SPLIT_MODES, ThresholdSource
from moesaic.launch.engine.scheduler import SchedulerConfig
from moesaic.launch.engine.step import SplitThresholds, StepRules
from moesaic.launch.engine.synthetic_batch import PoolShape, SyntheticBatch, decode_batch, prefill_batch
from moesaic.overlap.calibration import Measurement, Profile, read_profile

LAYOUT = {"ep_size": 2}
TOLD = ThresholdSource(
    layout=LAYOUT,
    hardware="here",
    profile=Profile(
        hardware="elsewhere",
        date="2026-10-01",
        layout=LAYOUT,
        modes={
            "prefill": (Measurement(num_tokens=6, straight_s=2.0, split_s=1.0),),
            "decode": (Measurement(num_tokens=4, straight_s=1.0, split_s=1.0),),
        },
    ),
)
LAYOUTS = {
    "dp2-auto": {"tp": 2, "dp": 2, "a2a": "torch"},
    "dp2-normal": {"tp": 2, "dp": 2, "a2a": "torch", "mode": "normal"},
    "tp2-none": {"tp": 2, "dp": 1, "ep": 2},
}


def calibrate_job(
    rank: int, settings: EngineSettings, sources: list[ThresholdSource], requests: list[GenerateRequest]
) -> tuple[SplitThresholds, Profile | None, list[tuple[int, int]], dict[int, Finished]]:
    """Settle the profile before the engine's first step, then run the requests with what was settled."""
    torch.set_num_threads(1)
    engine = make_engine(settings, rank)
    rules = StepRules(
        attn_tp_size=settings.topology.attn_tp_size,
        a2a=settings.a2a != "none",
        mode=settings.mode,  # type: ignore[arg-type]
        cap=settings.cap,
    )
    sizes = SchedulerConfig(
        num_pages=settings.num_pages, page_size=settings.page_size, max_running=8, context_length=64, chunk_tokens=10
    )
    progress: list[tuple[int, int]] = []
    calibration = Calibration(engine.runner, rules, sizes)
    thresholds, profile = settle_profile(sources[rank], calibration, lambda done, total: progress.append((done, total)))
    place = settings.topology.place(rank)
    own = [request for i, request in enumerate(requests) if i % settings.dp == place.dp_rank]
    finished = run_waves(engine, [own])
    assert engine.scheduler.cache.available_pages() == settings.num_pages
    return thresholds, profile, progress, finished if place.is_leader else {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_measure_the_same_and_leave_nothing_behind(
    layout: str, tiny: Callable[..., TinyModel], rank_pool: RankPool, tmp_path: Path
) -> None:
    model, rng = tiny("plain"), random.Random(4)
    settings = EngineSettings(model_path=str(model.folder), num_pages=64, **LAYOUTS[layout])
    source = ThresholdSource(layout=LAYOUT, hardware="2 ranks")
    sources = [replace(source, save_to=str(tmp_path / "tbo.json")), source]
    prompts = [[rng.randrange(2, 256) for _ in range(length)] for length in (1, 5, 9, 30)]

    results = rank_pool.run(2, calibrate_job, settings, sources, [greedy_request(i, prompt, 6) for i, prompt in enumerate(prompts)])

    (thresholds, profile, progress, _), (others_thresholds, others_profile, _, _) = results
    assert thresholds == others_thresholds
    assert profile is not None and others_profile is None
    assert SplitThresholds(**profile.thresholds()) == thresholds
    sizes = {mode: [point.num_tokens for point in points] for mode, points in profile.modes.items()}
    assert sizes == {"prefill": [2, 4, 8, 10], "decode": [2, 4, 8]}
    assert progress == [(done, 7) for done in range(8)]
    assert read_profile(tmp_path / "tbo.json", layout=LAYOUT, modes=SPLIT_MODES) == profile
    finished = merged([tokens for *_, tokens in results])
    assert [finished[i].tokens for i in range(4)] == [model.greedy(prompt, 6) for prompt in prompts]


def test_what_rank_0_was_told_holds_for_all_and_nothing_is_measured(tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    settings = EngineSettings(model_path=str(tiny("plain").folder), **LAYOUTS["dp2-auto"])
    # As on another node, which has no file.
    sources = [TOLD, replace(TOLD, profile=None)]

    results = rank_pool.run(2, calibrate_job, settings, sources, [])

    assert [(thresholds, progress) for thresholds, _, progress, _ in results] == [(SplitThresholds(prefill=6), [])] * 2
    assert [profile for _, profile, _, _ in results] == [TOLD.profile, None]


def test_the_profile_travels_to_the_http_process() -> None:
    ready = Ready(
        rank=0,
        max_total_num_tokens=1,
        kv_bytes_per_token=1,
        weight_bytes=1,
        phase_seconds=[("calibrate overlap", 2.0)],
        overlap_profile=TOLD.profile,
    )
    arrived = from_rank_decoder.decode(encoder.encode(ready))
    assert isinstance(arrived, Ready)
    assert isinstance(arrived.overlap_profile, OverlapProfile)
    assert arrived.overlap_profile.thresholds() == {"prefill": 6, "decode": None}


POOL = PoolShape(num_pages=40, page_size=4, context_length=30)


def _contexts(metadata: AttentionMetadata) -> list[tuple[int, list[int]]]:
    """(length with this step's tokens, pages) of every sequence."""
    decodes = [
        (int(length), pages.tolist())
        for bucket in metadata.buckets
        for length, pages in zip(bucket.seq_lens, bucket.page_table, strict=True)
    ]
    return decodes + [(chunk.prefix_len + chunk.length, chunk.pages.tolist()) for chunk in metadata.extends]


@pytest.mark.parametrize(("make", "num_tokens"), [(make, n) for make in (decode_batch, prefill_batch) for n in (2, 3, 8, 37)])
def test_synthetic_batches_lie_in_the_pool_as_real_ones_do(
    make: Callable[[int, torch.Tensor, PoolShape], SyntheticBatch], num_tokens: int
) -> None:
    batch = make(num_tokens, torch.arange(num_tokens), POOL)

    metadata = batch.metadata
    assert len(metadata.positions) == len(metadata.slots) == num_tokens == batch.num_decode + sum(batch.chunk_lengths)
    assert len(set(metadata.slots.tolist())) == num_tokens
    contexts = _contexts(metadata)
    held = [page for _, pages in contexts for page in pages]
    assert len(held) == len(set(held)) and set(held) <= set(range(POOL.num_pages))
    assert len(contexts) >= 2
    for length, pages in contexts:
        assert 0 < length <= POOL.context_length
        assert len(pages) == -(-length // POOL.page_size)
    # One row after the other, each sequence's last one gives logits.
    lengths = [1] * batch.num_decode or [length for length, _ in contexts]
    assert metadata.positions.tolist() == [row for length, _ in contexts for row in range(length)[-1 if batch.num_decode else 0 :]]
    assert batch.logit_rows.tolist() == [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]
