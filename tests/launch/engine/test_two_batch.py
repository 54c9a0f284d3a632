"""Tokens don't change when steps overlap within themselves, as two micro-batches or as one: every kind of step that there is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from engine_jobs import EngineSettings, greedy_request, make_engine, merged, rebalance_job
from overlap_jobs import ForwardSeen, overlap_job
from rank_pool import RankPool
from tiny_models import TinyModel
from traffic_jobs import Arrival

from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.settings import RebalanceSettings, SlotOptions
from moesaic.launch.engine.messages import AbortRequest
from moesaic.launch.engine.step import SplitThresholds
from moesaic.launch.models.config import load_model_config

NUM_TOKENS = 8
ALWAYS = SplitThresholds(prefill=2, decode=2)
LAYOUTS = {
    "tp1": {"tp": 1, "dp": 1},
    "dp2-ep2": {"tp": 2, "dp": 2, "ep": 2},
    "tp2-dp1": {"tp": 2, "dp": 1, "ep": 2},
    "dp4-ep4": {"tp": 4, "dp": 4, "ep": 4},
    "tp4-dp2": {"tp": 4, "dp": 2, "ep": 2},
    "tp4-dp2-ep4": {"tp": 4, "dp": 2, "ep": 4},
}
OVERLAPS: dict[str, dict[str, Any]] = {
    "two": {"split_from": ALWAYS},
    "single": {"single_batch_overlap": True},
    "both": {"split_from": ALWAYS, "single_batch_overlap": True},
}
CASES = [
    ("tp1", "none", "auto", "plain", "two"),
    ("dp2-ep2", "torch", "auto", "plain", "two"),
    ("dp2-ep2", "torch", "normal", "fp8", "both"),
    ("dp2-ep2", "none", "low_latency", "plain", "two"),
    ("dp2-ep2", "torch", "normal", "plain", "single"),
    ("dp2-ep2", "torch", "low_latency", "plain", "single"),
    ("dp2-ep2", "none", "auto", "plain", "single"),
    ("tp2-dp1", "torch", "auto", "plain", "both"),
    ("dp4-ep4", "torch", "low_latency", "plain", "both"),
    ("dp4-ep4", "torch", "auto", "plain", "two"),
    ("dp4-ep4", "none", "auto", "plain", "single"),
    ("tp4-dp2", "torch", "auto", "plain", "both"),
    ("tp4-dp2", "none", "normal", "plain", "two"),
]
"""Layout, backend, dispatch mode, checkpoint, overlap."""


def _prompts(count: int) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(2, 256) for _ in range(rng.choice([1, 2, 9, 33, 40]))] for _ in range(count)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_tokens_equal_the_oracles_when_every_step_that_can_overlap_does(
    case: tuple[str, str, str, str, str], tiny: Callable[..., TinyModel], rank_pool: RankPool
) -> None:
    """One request alone (other ranks are idle), then many at once, some aborted on the way, then all again on cached prefixes."""
    layout, backend, mode, variant, overlap = case
    model = tiny(variant)
    settings = EngineSettings(
        model_path=str(model.folder), a2a=backend, mode=mode, chunk_tokens=24, cap=512, **OVERLAPS[overlap], **LAYOUTS[layout]
    )
    prompts = _prompts(12)
    expected = [model.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    aborted = range(300, 300 + settings.dp)
    waves = [
        [Arrival(message=greedy_request(100, prompts[3], NUM_TOKENS))],
        [
            *(Arrival(message=greedy_request(i, prompt, NUM_TOKENS), home=i) for i, prompt in enumerate(prompts)),
            *(Arrival(message=greedy_request(rid, prompts[rid % 12][::-1], 20), home=rid) for rid in aborted),
            *(Arrival(message=AbortRequest(rid=rid), home=rid, follows=rid, tokens=2) for rid in aborted),
        ],
        [Arrival(message=greedy_request(200 + i, prompt, NUM_TOKENS), home=i) for i, prompt in enumerate(prompts)],
    ]

    results = rank_pool.run(settings.tp, overlap_job, settings, waves)

    finished = merged([tokens for tokens, _ in results])
    assert finished[100].tokens == expected[3]
    for i, tokens in enumerate(expected):
        assert finished[i].tokens == tokens, f"prompt {i}"
        assert finished[200 + i].tokens == tokens, f"prompt {i} with what the cache kept"
    assert {finished[rid].finish_reason for rid in aborted} == {"abort"}
    _check_variety([forward for _, seen in results for forward in seen], settings)


def _check_variety(seen: list[ForwardSeen], settings: EngineSettings) -> None:
    """The traffic was what the test says."""
    assert any(forward.num_tokens == 1 and not forward.split for forward in seen), "a token alone"
    assert settings.dp == 1 or any(not forward.num_tokens for forward in seen), "an idle rank"
    if settings.split_from != SplitThresholds():
        assert any(forward.split and forward.extends for forward in seen), "a split prefill"
        assert any(forward.split and not forward.extends and forward.num_tokens for forward in seen), "a split decode"
        assert any(forward.inside for forward in seen), "a split inside a sequence with a prefix"
        assert settings.dp == 1 or any(forward.split and not forward.num_tokens for forward in seen), "an idle rank in a split step"


MOVES = [
    ("dp2-ep2", "torch", "auto", "two"),
    ("dp2-ep2", "torch", "normal", "single"),
    ("dp4-ep4", "torch", "auto", "both"),
    ("tp4-dp2-ep4", "none", "auto", "single"),
]


@pytest.mark.parametrize("case", MOVES, ids="-".join)
def test_tokens_equal_the_oracles_while_experts_move_between_steps_that_overlap(
    case: tuple[str, str, str, str], tiny: Callable[..., TinyModel], rank_pool: RankPool
) -> None:
    layout, backend, mode, overlap = case
    model = tiny("plain")
    config = load_model_config(str(model.folder))
    location = ExpertLocation.trivial(
        num_layers=len(config.sparse_layers),
        num_experts=config.n_routed_experts,
        num_slots=config.n_routed_experts + 4,
        ep_size=LAYOUTS[layout]["ep"],
    )
    settings = EngineSettings(
        model_path=str(model.folder),
        a2a=backend,
        mode=mode,
        chunk_tokens=24,
        slots=SlotOptions(location=location, movable=True),
        rebalance=RebalanceSettings(config=RebalanceConfig(num_iterations=2, cost_s_per_gib=1e-9)),
        **OVERLAPS[overlap],
        **LAYOUTS[layout],
    )
    prompts = _prompts(8)
    requests = [greedy_request(i, prompt, 24) for i, prompt in enumerate(prompts)]

    results = rank_pool.run(settings.tp, rebalance_job, settings, [requests])

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
