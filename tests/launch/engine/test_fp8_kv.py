"""An FP8 KV cache changes what the model says by its rounding alone, in every layout, and takes a quarter of float32's memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_jobs import EngineSettings, Finished, engine_job, greedy_request, make_runner, merged
from rank_pool import RankPool
from tiny_models import TinyModel

LAYOUTS: dict[str, dict[str, Any]] = {"tp1": {}, "dp2-ep2": {"tp": 2, "dp": 2, "a2a": "torch"}, "tp2": {"tp": 2, "ep": 2}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_said_depends_on_the_rounding_alone(layout: str, tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    """Whole prompts, prompts in chunks, and hits of the prefix cache all read the same rounded rows."""
    exact = EngineSettings(model_path=str(tiny("plain").folder), **LAYOUTS[layout])
    whole = replace(exact, kv_dtype=torch.float8_e4m3fn)
    chunked = replace(whole, chunk_tokens=8)
    rng = random.Random(3)
    prompts = [[rng.randrange(2, 256) for _ in range(40)] for _ in range(4)]
    waves = [
        [greedy_request(10 * wave + i, prompt, 4, logprob_start_len=start) for i, prompt in enumerate(prompts)]
        for wave, start in enumerate((0, 36))
    ]

    unrounded, first, second = (
        _prompt_logprobs(merged(rank_pool.run(exact.tp, engine_job, each, waves))) for each in (exact, whole, chunked)
    )

    torch.testing.assert_close(second, first, atol=1e-3, rtol=0)
    difference = (first - unrounded).abs()
    assert 1e-3 < difference.median() < 0.05


def test_it_takes_a_quarter_of_the_memory(tiny: Callable[..., TinyModel]) -> None:
    settings = EngineSettings(model_path=str(tiny("plain").folder))
    sizes = [make_runner(replace(settings, kv_dtype=dtype)).kv_bytes_per_token for dtype in (None, torch.float8_e4m3fn)]

    assert sizes[0] == 4 * sizes[1]


def _prompt_logprobs(finished: dict[int, Finished]) -> torch.Tensor:
    entries = [entry for rid in sorted(finished) for entry in finished[rid].prompt_logprobs]
    return torch.tensor([entry.logprob for entry in entries if entry.logprob is not None])
