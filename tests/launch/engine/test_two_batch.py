"""Tokens don't change when steps run as two micro-batches: prefill and decode, idle ranks, splits inside a sequence, rebalances."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from engine_jobs import EngineSettings, engine_job, greedy_request, make_engine, merged, rebalance_job
from rank_pool import RankPool
from tiny_models import TinyModel

from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.settings import RebalanceSettings, SlotOptions
from moesaic.launch.engine.step import SplitThresholds
from moesaic.launch.models.config import load_model_config

NUM_TOKENS = 8
ALWAYS = SplitThresholds(prefill=2, decode=2)
LAYOUTS = {
    "tp1": {"tp": 1, "dp": 1},
    "dp2-ep2": {"tp": 2, "dp": 2, "ep": 2},
    "dp4-ep4": {"tp": 4, "dp": 4, "ep": 4},
    "tp4-dp2": {"tp": 4, "dp": 2, "ep": 2},
}
CASES = [
    ("tp1", "none", "auto", "plain"),
    ("dp2-ep2", "torch", "auto", "plain"),
    ("dp2-ep2", "torch", "normal", "fp8"),
    ("dp2-ep2", "none", "low_latency", "plain"),
    ("dp4-ep4", "torch", "low_latency", "plain"),
    ("dp4-ep4", "torch", "auto", "plain"),
    ("tp4-dp2", "torch", "auto", "plain"),
    ("tp4-dp2", "none", "normal", "plain"),
]


def _prompts(count: int) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(2, 256) for _ in range(rng.choice([1, 2, 9, 33, 40]))] for _ in range(count)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_tokens_equal_the_oracles_when_every_step_that_can_be_split_is(
    case: tuple[str, str, str, str], tiny: Callable[..., TinyModel], rank_pool: RankPool
) -> None:
    layout, backend, mode, variant = case
    model = tiny(variant)
    settings = EngineSettings(
        model_path=str(model.folder), a2a=backend, mode=mode, chunk_tokens=24, cap=512, split_from=ALWAYS, **LAYOUTS[layout]
    )
    prompts = _prompts(12)
    expected = [model.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    # One alone (all other ranks are idle), then all at once, then again, with what the prefix cache kept.
    waves = [
        [greedy_request(100, prompts[3], NUM_TOKENS)],
        [greedy_request(i, prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)],
        [greedy_request(200 + i, prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)],
    ]

    finished = merged(rank_pool.run(settings.tp, engine_job, settings, waves))

    assert finished[100].tokens == expected[3]
    for i, tokens in enumerate(expected):
        assert finished[i].tokens == tokens, f"prompt {i}"
        assert finished[200 + i].tokens == tokens, f"prompt {i} with what the cache kept"


def test_tokens_equal_the_oracles_while_experts_move_between_split_steps(
    tiny: Callable[..., TinyModel], rank_pool: RankPool
) -> None:
    model = tiny("plain")
    config = load_model_config(str(model.folder))
    location = ExpertLocation.trivial(
        num_layers=len(config.sparse_layers), num_experts=config.n_routed_experts, num_slots=config.n_routed_experts + 4, ep_size=2
    )
    settings = EngineSettings(
        model_path=str(model.folder),
        a2a="torch",
        chunk_tokens=24,
        split_from=ALWAYS,
        slots=SlotOptions(location=location, movable=True),
        rebalance=RebalanceSettings(config=RebalanceConfig(num_iterations=2, cost_s_per_gib=1e-9)),
        **LAYOUTS["dp2-ep2"],
    )
    prompts = _prompts(8)
    requests = [greedy_request(i, prompt, 24) for i, prompt in enumerate(prompts)]

    results = rank_pool.run(2, rebalance_job, settings, [requests])

    finished = merged([tokens for tokens, _, _ in results])
    assert [finished[i].tokens for i in range(8)] == [model.greedy(prompt, 24) for prompt in prompts]
    assert all(midway > 0 for _, _, midway in results), "no layer moved while requests ran"


def test_steps_are_split_from_their_threshold_on_and_a_single_row_never_is(tiny: Callable[..., TinyModel]) -> None:
    thresholds = SplitThresholds(prefill=20, decode=3)
    engine = make_engine(EngineSettings(model_path=str(tiny("plain").folder), split_from=thresholds))
    split_at: dict[bool, list[tuple[int, bool]]] = {True: [], False: []}
    for wave in ([[5] * 19], [[7] * 21], [[i + 2] * 3 for i in range(4)]):
        for i, prompt in enumerate(wave):
            engine.apply(greedy_request(i, prompt, 3 + i))
        while True:
            step = engine.step().step
            if step.quiet:
                break
            if not step.idle:
                split_at[step.extends].append((step.num_tokens[0], step.split is not None))

    assert split_at[True] == [(19, False), (21, True), (12, False)]
    assert split_at[False] == [(1, False)] * 4 + [(4, True)] * 2 + [(3, True), (2, False), (1, False)]
