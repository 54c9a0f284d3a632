"""Tokens don't change when experts move in the middle of a generation, whatever the layout, policy and choice of replicas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_jobs import EngineSettings, engine_job, forward_modes_job, greedy_request, merged, rebalance_job
from rank_pool import RankPool
from tiny_models import TinyModel

from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.settings import RebalanceSettings, SlotOptions
from moesaic.launch.models.config import load_model_config

NUM_TOKENS = 24
PROMPTS = [[7, 3, 250, 8, 9, 30], [5] * 20, [99, 12], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
EP = {
    "dp2-ep2": {"tp": 2, "dp": 2, "ep": 2},
    "dp4-ep4": {"tp": 4, "dp": 4, "ep": 4},
    "tp4-dp2": {"tp": 4, "dp": 2, "ep": 4},
    "tp4-dp1": {"tp": 4, "dp": 1, "ep": 4},
}
# (layout, backend, dispatch mode, redundant experts, policy, replica choice): every value of each, not every combination.
CASES = [
    ("dp2-ep2", "torch", "auto", 0, "auto", "static"),
    ("dp2-ep2", "none", "normal", 4, "deepseek", "dynamic"),
    ("dp2-ep2", "torch", "normal", 8, "auto", "balanced"),
    ("dp4-ep4", "torch", "low_latency", 4, "auto", "activated"),
    ("dp4-ep4", "torch", "auto", 8, "deepseek_hierarchical", "probability"),
    ("dp4-ep4", "none", "low_latency", 0, "auto", "static"),
    ("dp4-ep4", "none", "auto", 8, "auto", "balanced"),
    ("tp4-dp2", "torch", "auto", 4, "auto", "balanced"),
    ("tp4-dp2", "none", "normal", 8, "deepseek", "static"),
    ("tp4-dp1", "none", "auto", 4, "auto", "dynamic"),
    ("tp4-dp1", "torch", "auto", 8, "auto", "activated"),
]


def _settings(model: TinyModel, case: tuple[str, str, str, int, str, str]) -> EngineSettings:
    layout, backend, mode, redundant, policy, choice = case
    sizes = EP[layout]
    config = load_model_config(str(model.folder))
    location = ExpertLocation.trivial(
        num_layers=len(config.sparse_layers),
        num_experts=config.n_routed_experts,
        num_slots=config.n_routed_experts + redundant,
        ep_size=sizes["ep"],
    )
    return EngineSettings(
        model_path=str(model.folder),
        a2a=backend,
        mode=mode,
        chunk_tokens=7,
        slots=SlotOptions(location=location, replica_choice=choice, movable=True),
        rebalance=RebalanceSettings(config=RebalanceConfig(num_iterations=2, cost_s_per_gib=1e-9), algorithm=policy),
        **sizes,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_tokens_equal_the_oracles_while_experts_move(
    case: tuple[str, str, str, int, str, str], tiny: Callable[..., TinyModel], rank_pool: RankPool
) -> None:
    model = tiny("plain")
    settings = _settings(model, case)
    requests = [greedy_request(i, prompt, NUM_TOKENS) for i, prompt in enumerate(PROMPTS)]

    results = rank_pool.run(settings.tp, rebalance_job, settings, [requests])

    finished = merged([tokens for tokens, _, _ in results])
    assert [finished[i].tokens for i in range(len(PROMPTS))] == [model.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
    statuses = [status for _, status, _ in results]
    assert [status.last_cause for status in statuses] == [""] * settings.tp
    assert len({(status.cycle, status.committed_cycles, status.layers_moved) for status in statuses}) == 1
    assert all(midway > 0 for _, _, midway in results), "no layer moved while requests ran"


def test_experts_stay_put_and_are_reported_when_nothing_may_move(tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    model = tiny("plain")
    settings = EngineSettings(
        model_path=str(model.folder),
        a2a="torch",
        rebalance=RebalanceSettings(config=RebalanceConfig(num_iterations=3), moves=False),
        **EP["dp2-ep2"],
    )
    requests = [greedy_request(i, prompt, NUM_TOKENS) for i, prompt in enumerate(PROMPTS)]

    results = rank_pool.run(2, rebalance_job, settings, [requests])

    for _, status, midway in results:
        assert (status.layers_moved, midway, status.bytes_moved) == (0, 0, 0)
        assert status.skipped_cycles > 0
        assert 0 < status.last_balances["all"].balancedness <= status.last_balances["all"].bound <= 1


@pytest.mark.parametrize(("layout", "backend"), [("dp2-ep2", "torch"), ("tp4-dp2", "none")])
def test_each_forward_modes_choices_are_counted_apart(
    layout: str, backend: str, tiny: Callable[..., TinyModel], rank_pool: RankPool
) -> None:
    settings = EngineSettings(
        model_path=str(tiny("plain").folder),
        a2a=backend,
        rebalance=RebalanceSettings(config=RebalanceConfig(num_iterations=1 << 40), moves=False),
        **EP[layout],
    )
    prompts = [greedy_request(i, prompt, 100) for i, prompt in enumerate(PROMPTS)]

    for first, second in rank_pool.run(settings.tp, forward_modes_job, settings, prompts):
        assert first.keys() == {"all", "prefill"}
        assert second.keys() == {"all", "decode"}
        assert first["all"] == first["prefill"]


def test_a_placement_from_the_start_gives_the_oracles_tokens(tiny: Callable[..., TinyModel], rank_pool: RankPool) -> None:
    model = tiny("plain")
    config = load_model_config(str(model.folder))
    trivial = ExpertLocation.trivial(
        num_layers=len(config.sparse_layers), num_experts=config.n_routed_experts, num_slots=config.n_routed_experts, ep_size=2
    )
    reversed_slots = trivial.physical_to_logical[:, ::-1].copy()
    location = ExpertLocation(physical_to_logical=reversed_slots, num_experts=config.n_routed_experts, ep_size=2)
    settings = EngineSettings(model_path=str(model.folder), a2a="torch", slots=SlotOptions(location=location), **EP["dp2-ep2"])
    requests = [greedy_request(i, prompt, NUM_TOKENS) for i, prompt in enumerate(PROMPTS)]

    finished = merged(rank_pool.run(2, engine_job, settings, [requests]))

    assert [finished[i].tokens for i in range(len(PROMPTS))] == [model.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
