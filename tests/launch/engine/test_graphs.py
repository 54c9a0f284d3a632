"""Decode steps that replay captured forwards give the oracle's tokens; captured here by a stand-in that computes them again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import repeated_calls
import torch
from engine_jobs import EngineSettings, engine_job, greedy_request, make_runner, merged, rebalance_job
from rank_pool import RankPool
from tiny_models import TinyModel
from torch import Tensor

from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.settings import RebalanceSettings, SlotOptions
from moesaic.launch.engine.graph_plan import GraphPlan, GraphStep, graph_rows, graph_step, table_widths
from moesaic.launch.engine.messages import GenerateRequest
from moesaic.launch.engine.step import SplitThresholds, StepHeader, StepRules, resolve_step
from moesaic.launch.engine.synthetic_batch import PoolShape, decode_batch
from moesaic.launch.models.config import load_model_config
from moesaic.launch.models.forward import ForwardInput
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan

NUM_TOKENS = 8
ROWS = (1, 2, 3, 6)
FEW = {("tp1", 2), ("dp2-ep2", None), ("dp2-none", 2), ("dp4-ep4", 2), ("tp4-dp2", None), ("tp4-dp2", 2)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"tp": 1, "dp": 1, "a2a": "none"},
    "dp2-ep2": {"tp": 2, "dp": 2, "a2a": "torch"},
    "dp2-none": {"tp": 2, "dp": 2, "a2a": "none", "ep": 2},
    "dp4-ep4": {"tp": 4, "dp": 4, "a2a": "torch", "dp_lm_head": True},
    "tp4-dp2": {"tp": 4, "dp": 2, "a2a": "torch"},
}

CASES = [
    pytest.param(layout, split, marks=[] if (layout, split) in FEW else [pytest.mark.whole], id=f"{layout}-{split or 'straight'}")
    for layout in LAYOUTS
    for split in (None, 2)
]
"""Layout, and tokens from which steps split."""


def _counted_job(rank: int, settings: EngineSettings, waves: list[list[GenerateRequest]]) -> tuple[Any, int]:
    before = repeated_calls.num_replays
    return engine_job(rank, settings, waves), repeated_calls.num_replays - before


def _prompts(count: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(2, 256) for _ in range(rng.choice([1, 2, 9, 33, 40]))] for _ in range(count)]


@pytest.mark.parametrize(("layout", "split"), CASES)
def test_tokens_equal_the_oracles(layout: str, split: int | None, tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    """One request alone, so that other ranks replay without any, then as many as make some steps larger than every graph."""
    model = tiny("plain")
    settings = EngineSettings(
        model_path=str(model.folder),
        mode="low_latency",
        cap=512,
        graph_rows=ROWS,
        split_from=SplitThresholds(decode=split),
        **LAYOUTS[layout],
    )
    prompts = _prompts(9 * settings.dp)
    waves = [
        [greedy_request(100, prompts[0], NUM_TOKENS)],
        [greedy_request(i, prompt, NUM_TOKENS + i % 3) for i, prompt in enumerate(prompts)],
    ]

    results = rank_pool.run(settings.tp, _counted_job, settings, waves)

    finished = merged([outputs for outputs, _ in results])
    expected = {100: model.greedy(prompts[0], NUM_TOKENS)}
    expected |= {i: model.greedy(prompt, NUM_TOKENS + i % 3) for i, prompt in enumerate(prompts)}
    assert {rid: each.tokens for rid, each in finished.items()} == expected
    assert {num_replays for _, num_replays in results} == {results[0][1]}, "all ranks replay the same steps"
    assert results[0][1] >= NUM_TOKENS


@pytest.mark.parametrize("choice", [pytest.param("static", marks=pytest.mark.whole), "balanced"])
def test_experts_move_without_a_new_capture(choice: str, tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    """With `balanced` also: all ranks' counts are gathered in every layer of a replay, of idle ranks too."""
    model = tiny("plain")
    config = load_model_config(str(model.folder))
    num_experts = config.n_routed_experts
    location = ExpertLocation.trivial(
        num_layers=len(config.sparse_layers), num_experts=num_experts, num_slots=num_experts + 4, ep_size=2
    )
    settings = EngineSettings(
        model_path=str(model.folder),
        mode="low_latency",
        cap=512,
        graph_rows=ROWS,
        slots=SlotOptions(location=location, replica_choice=choice, movable=True),
        rebalance=RebalanceSettings(config=RebalanceConfig(num_iterations=2, cost_s_per_gib=1e-9)),
        **LAYOUTS["dp2-ep2"],
    )
    prompts = _prompts(6)
    requests = [greedy_request(i, prompt, 24) for i, prompt in enumerate(prompts)]

    results = rank_pool.run(2, rebalance_job, settings, [requests])

    finished = merged([outputs for outputs, _, _ in results])
    assert {rid: each.tokens for rid, each in finished.items()} == {i: model.greedy(p, 24) for i, p in enumerate(prompts)}
    assert all(midway > 0 for _, _, midway in results), "no layer moved while requests ran"


@pytest.mark.parametrize("split", [None, 2], ids=["straight", "two"])
def test_observers_see_the_choices_of_the_steps_own_rows(split: int | None, tiny: Callable[..., TinyModel]) -> None:
    """Those that the same forward shows operation by operation; blank rows choose nobody."""
    settings = EngineSettings(
        model_path=str(tiny("plain").folder), graph_rows=(8,), mode="low_latency", split_from=SplitThresholds(decode=split)
    )
    runner = make_runner(settings)
    pool = PoolShape(num_pages=settings.num_pages, page_size=settings.page_size, context_length=settings.context_length)
    batch = decode_batch(5, torch.arange(5) + 7, pool)
    inputs = ForwardInput(
        input_ids=batch.input_ids,
        metadata=batch.metadata,
        plan=DispatchPlan(mode=DispatchMode.LOW_LATENCY, num_tokens_per_rank=(5,)),
        logit_rows=batch.logit_rows,
        num_logits_per_dp_rank=(5,),
    )
    eager: dict[int, Tensor] = {}
    replayed: dict[int, Tensor] = {}

    wanted = runner.forward(inputs, eager.__setitem__)
    logits = runner.forward(inputs, replayed.__setitem__, graph=GraphStep(num_rows=8, splits=split is not None))

    torch.testing.assert_close(logits[:5], wanted)
    assert eager.keys() == replayed.keys()
    assert all(torch.equal(eager[layer], replayed[layer]) for layer in eager)


def test_sizes_are_the_usual_ones_or_those_asked_for() -> None:
    assert graph_rows(None, 20) == (1, 2, 4, 8, 16, 20)
    assert graph_rows([8, 1, 8], 20) == (1, 8)
    with pytest.raises(ValueError, match=r"--cuda-graph-bs 24: a DP rank decodes 1 to 20"):
        graph_rows([8, 24], 20)
    assert table_widths(context_length=163840, page_size=64) == (64, 256, 1024, 2560)
    assert table_widths(context_length=256, page_size=64) == (4,)


def test_a_step_takes_the_smallest_graph_that_holds_every_rank() -> None:
    rows = (1, 4, 8)
    assert graph_step((0, 3), rows, None) == GraphStep(num_rows=4, splits=False)
    assert graph_step((9, 3), rows, None) is None, "larger than every graph"
    assert graph_step((0, 0), rows, None) is None, "idle"
    assert graph_step((0, 5), rows, 4) == GraphStep(num_rows=8, splits=True), "an idle rank has no say"
    assert graph_step((3, 5), rows, 4) == GraphStep(num_rows=8, splits=False)


def test_only_decode_steps_in_low_latency_mode_replay() -> None:
    rules = StepRules(attn_tp_size=1, a2a=True, mode="auto", cap=64, graph_rows=(4,))
    decodes, prefills = StepHeader(num_decode=3, num_logits=3), StepHeader(num_extend=3, num_logits=1)

    assert resolve_step([decodes, StepHeader()], rules).graph == GraphStep(num_rows=4, splits=False)
    assert resolve_step([decodes, prefills], rules).graph is None
    assert resolve_step([decodes, StepHeader()], replace(rules, mode="normal")).graph is None


def test_graphs_are_captured_largest_first_and_split_only_from_the_threshold_on() -> None:
    plan = GraphPlan(rows=(1, 4, 8), widths=(2, 16), split_from=6)

    assert [(step.num_rows, step.splits) for step in plan.steps()] == [(8, False), (8, True), (4, False), (1, False)]
    assert (plan.width(1), plan.width(3)) == (2, 16)
