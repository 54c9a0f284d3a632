"""Greedy tokens and prompt logprobs equal HF transformers' in every layout, backend, dispatch mode and chunking.

The whole product (7 checkpoints x 30 layouts x 2 chunk sizes) runs with `-m whole`; by default every layout runs once, with the
checkpoints and chunk sizes taken in turn, so that each value of each dimension meets many of the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from engine_jobs import EngineSettings, engine_job, greedy_request, merged
from rank_pool import RankPool
from tiny_models import VARIANTS, TinyModel

LAYOUTS = {
    "tp1": {"tp": 1, "dp": 1},
    "dp2-ep2": {"tp": 2, "dp": 2, "ep": 2},
    "dp4-ep4": {"tp": 4, "dp": 4, "ep": 4},
    "tp4-dp2": {"tp": 4, "dp": 2, "ep": 2},
    "tp4-dp1": {"tp": 4, "dp": 1, "ep": 1},
}
PLACES = [
    (layout, backend, mode) for layout in LAYOUTS for backend in ("none", "torch") for mode in ("normal", "low_latency", "auto")
]
CHUNKS = (7, 256)
COVER = [(list(VARIANTS)[i % len(VARIANTS)], place, CHUNKS[i % 2]) for i, place in enumerate(PLACES)]
NUM_TOKENS = 6


def _prompts() -> list[list[int]]:
    """One alone, then strangers of mixed lengths, two of which share a prefix with the first."""
    rng = random.Random(7)
    first = [rng.randrange(2, 256) for _ in range(29)]
    return [first, [3], [*first[:17], 9, 9], [rng.randrange(2, 256) for _ in range(40)], first[:24], [5, 6]]


@cache
def _expected(model: TinyModel) -> tuple[list[list[int]], list[list[float]]]:
    prompts = _prompts()
    return [model.greedy(p, NUM_TOKENS) for p in prompts], [model.prompt_logprobs(p) for p in prompts]


def _check(model: TinyModel, pool: RankPool, place: tuple[str, str, str], chunk: int, **options: Any) -> None:
    layout, backend, mode = place
    settings = EngineSettings(
        model_path=str(model.folder), a2a=backend, mode=mode, chunk_tokens=chunk, cap=512, **LAYOUTS[layout], **options
    )
    prompts = _prompts()
    tokens, logprobs = _expected(model)
    alone = [greedy_request(0, prompts[0], NUM_TOKENS, logprob_start_len=0)]
    strangers = [greedy_request(i, p, NUM_TOKENS, logprob_start_len=0) for i, p in enumerate(prompts) if i]
    again = [greedy_request(100 + i, p, NUM_TOKENS) for i, p in enumerate(prompts)]
    results = pool.run(settings.tp, engine_job, settings, [alone, strangers, again])
    finished = merged(results)
    for i in range(len(prompts)):
        assert finished[i].tokens == tokens[i], f"cold prompt {i}"
        assert finished[100 + i].tokens == tokens[i], f"prompt {i} with a prefix hit"
        assert finished[i].prompt_logprobs[0].logprob is None
        found = [entry.logprob for entry in finished[i].prompt_logprobs[1:]]
        assert found == pytest.approx(logprobs[i], abs=1e-4)
    assert finished[100].cached_tokens == 28, "the first prompt's 29 tokens are cached but for the last"


@pytest.mark.parametrize(
    ("variant", "place", "chunk"), COVER, ids=lambda value: "-".join(value) if isinstance(value, tuple) else None
)
def test_tokens_equal_the_oracle(
    variant: str, place: tuple[str, str, str], chunk: int, tiny: Callable[..., TinyModel], rank_pool: RankPool
) -> None:
    _check(tiny(variant), rank_pool, place, chunk)


@pytest.mark.whole
@pytest.mark.parametrize("place", PLACES, ids="-".join)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_tokens_equal_the_oracle_in_the_whole_product(
    variant: str, place: tuple[str, str, str], chunk: int, tiny: Callable[..., TinyModel], rank_pool: RankPool
) -> None:
    _check(tiny(variant), rank_pool, place, chunk)


@pytest.mark.parametrize("options", [{"dp_lm_head": True}, {"dense_tp": False}, {"page_size": 1}, {"alignment": 8}, {"ep": 4}])
def test_other_layout_choices_change_no_token(options: dict[str, int], tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    model = tiny("plain")
    settings = EngineSettings(model_path=str(model.folder), **{"tp": 4, "dp": 2, "a2a": "none", "ep": 2, **options})
    requests = [greedy_request(i, prompt, NUM_TOKENS) for i, prompt in enumerate(_prompts())]
    finished = merged(rank_pool.run(4, engine_job, settings, [requests]))
    assert [finished[i].tokens for i in range(len(requests))] == _expected(model)[0]


def test_w8a8_is_the_same_in_every_layout_but_for_ties(tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    """FP8 activations change the numbers (so no oracle), but not from one layout to the next, unless a value lies between two that
    FP8 can hold, where the last bit of a sum decides: rare, but it may change a token.
    """
    model = tiny("fp8")
    requests = [greedy_request(i, prompt, 0, logprob_start_len=0) for i, prompt in enumerate(_prompts())]

    def prompt_logprobs(**options: Any) -> torch.Tensor:
        settings = EngineSettings(model_path=str(model.folder), **options)
        finished = merged(rank_pool.run(settings.tp, engine_job, settings, [requests]))
        return torch.tensor([entry.logprob for i in range(len(requests)) for entry in finished[i].prompt_logprobs[1:]])

    one = prompt_logprobs(fp8_activations=True)
    for layout in ({"chunk_tokens": 7}, {"tp": 2, "dp": 2, "ep": 2}, {"tp": 2, "dp": 2, "a2a": "torch"}):
        same = torch.isclose(prompt_logprobs(fp8_activations=True, **layout), one, atol=1e-4, rtol=0)
        assert same.float().mean() > 0.95
    plain = torch.isclose(prompt_logprobs(), one, atol=1e-4, rtol=0)
    assert plain.float().mean() < 0.5


def test_bfloat16_stays_near_the_oracle_in_two_layouts(tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    """bf16 rounds, so tokens may differ from the fp32 oracle; prompt logprobs must stay near."""
    model = tiny("plain")
    prompts = _prompts()
    requests = [greedy_request(i, prompt, NUM_TOKENS, logprob_start_len=0) for i, prompt in enumerate(prompts)]
    one = EngineSettings(model_path=str(model.folder), dtype=torch.bfloat16)
    two = EngineSettings(model_path=str(model.folder), dtype=torch.bfloat16, tp=2, dp=2, a2a="torch")
    for finished in (engine_job(0, one, [requests]), merged(rank_pool.run(2, engine_job, two, [requests]))):
        for i in range(len(prompts)):
            found = torch.tensor([entry.logprob for entry in finished[i].prompt_logprobs[1:]])
            assert not len(found) or (found - torch.tensor(_expected(model)[1][i])).abs().mean() < 0.15


def test_tokens_equal_the_oracle_with_torchs_attention_for_prompts(tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    _check(tiny("plain"), rank_pool, ("dp2-ep2", "torch", "auto"), 7, prefill_backend="torch_native")


BLOCKS = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "n_shared_experts": 2}
HEADS = {"qk_nope_head_dim": 48, "v_head_dim": 64, "num_hidden_layers": 2}


def test_weights_that_stay_in_fp8_say_what_the_simulation_says(tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    """Alone with sizes that end inside blocks, and with attention TP that cuts whole ones. The device's path, on CPU tensors.

    A value between two that FP8 can hold may be rounded either way, so one request of six may part.
    """
    for sizes, layout in (({}, {}), (BLOCKS | HEADS, {"tp": 2, "ep": 2})):
        model = tiny("fp8", **sizes)
        requests = [greedy_request(i, prompt, NUM_TOKENS, logprob_start_len=0) for i, prompt in enumerate(_prompts())]
        tokens, logprobs = [], []
        for kept in (False, True):
            settings = EngineSettings(model_path=str(model.folder), fp8_activations=True, fp8_weights=kept, **layout)
            finished = merged(rank_pool.run(settings.tp, engine_job, settings, [requests]))
            tokens.append([finished[i].tokens for i in range(len(requests))])
            logprobs.append(torch.tensor([each.logprob for i in range(len(requests)) for each in finished[i].prompt_logprobs[1:]]))
        torch.testing.assert_close(*logprobs, rtol=0, atol=0.1)
        assert (logprobs[0] - logprobs[1]).abs().mean() < 0.02
        assert sum(one == other for one, other in zip(*tokens, strict=True)) >= len(requests) - 1
