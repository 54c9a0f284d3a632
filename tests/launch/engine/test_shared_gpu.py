"""The engine on one GPU, alone or with several ranks on it, says what HF transformers says of the demo model.

Numbers are bf16 on a GPU, so a request may leave the oracle's path at a near-tie: such are counted. On a CPU the same tests run in
fp32 with everything staged that would be on a GPU (the larger ones with `-m whole`). On a machine with a GPU and the packages
torch, triton, numpy, safetensors, transformers, msgspec, pytest and pytest-timeout, from the repository's root:

    mkdir -p /tmp/site && ln -sfn $PWD /tmp/site/moesaic && PYTHONPATH=/tmp/site python3 -m pytest -q -m gpu tests/launch/engine

(`-m gpu tests/kernels tests/moe tests/launch/engine` is everything that a GPU is for; none of it imports the server's packages.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import demo_oracle
import interpreter
import pytest
import torch
from engine_jobs import EngineSettings, Finished, engine_job, greedy_request, merged, rebalance_job
from near_ties import num_near_ties
from rank_pool import RankPool
from tiny_models import TinyModel

from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.settings import RebalanceSettings, SlotOptions
from moesaic.launch.models.config import load_model_config

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(1200),
]
DEADLINE_S = {"cpu": 200, "cuda:0": 1000}
"""Kernels are compiled when they are first called."""

NUM_TOKENS = 16
NEAR_TIE = {"cpu": 1e-3, "cuda:0": 0.25}
"""Logits reach some 20, where bf16 has steps of an eighth."""

PROMPTS = [
    [281, 1024, 77, 512, 900, 33, 4, 1701, 12, 2048, 99, 100, 101, 7, 1500, 18, 44, 260, 3000],
    [3],
    [281, 1024, 77, 512, 900, 33, 4, 1701, 12, 2048, 99, 100, 9, 9],
    [*range(300, 340)],
    [17, 2500],
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"tp": 2, "dp": 2, "a2a": "torch"},
    "dp4": {"tp": 4, "dp": 4, "a2a": "torch"},
    "tp4-dp2": {"tp": 4, "dp": 2, "a2a": "torch"},
    "tp2-none": {"tp": 2, "dp": 1, "a2a": "none", "ep": 2},
    "dp4-none": {"tp": 4, "dp": 4, "a2a": "none", "ep": 4},
}


def each_device(*names: str, quick: str | None = None) -> list[Any]:
    """Every name on a GPU and on a CPU; on a CPU only `quick` is in `make test`."""
    marks = {name: () if name == quick else (pytest.mark.whole,) for name in names}
    on_cpu = [pytest.param(name, "cpu", marks=marks[name], id=f"{name}-cpu") for name in names]
    return on_cpu + [pytest.param(name, "cuda:0", marks=GPU, id=f"{name}-cuda") for name in names]


def _settings(model: TinyModel, device: str, **options: Any) -> EngineSettings:
    on_gpu = device != "cpu"
    return EngineSettings(
        model_path=str(model.folder),
        device=device,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        expert_backends=("triton" if on_gpu else "torch",),
        page_size=64,
        num_pages=32,
        max_running=8,
        cap=128,
        **{"staged": True, **options},
    )


def _waves() -> list[list[Any]]:
    """One alone (other ranks are idle), the others, then all again on cached prefixes."""
    first, *others = [greedy_request(index, prompt, NUM_TOKENS) for index, prompt in enumerate(PROMPTS)]
    return [[first], others, [greedy_request(100 + index, prompt, NUM_TOKENS) for index, prompt in enumerate(PROMPTS)]]


def _check(finished: dict[int, Finished], device: str, *, most_ties: int) -> None:
    prompts = {rid: PROMPTS[rid % 100] for rid in finished}
    tokens = {rid: each.tokens for rid, each in finished.items()}
    assert [len(said) for said in tokens.values()] == [NUM_TOKENS] * len(tokens)
    ties = num_near_ties(demo_oracle.demo_model().logits, prompts, tokens, NEAR_TIE[device])
    assert ties <= (most_ties if device != "cpu" else 0), f"{ties} of {len(tokens)} requests left the oracle's path at a near-tie"


@pytest.mark.parametrize(("how", "device"), each_device("steps", "graphs"))
def test_one_rank_says_what_the_oracle_says(how: str, device: str, rank_pool: RankPool) -> None:
    settings = _settings(demo_oracle.demo_model(), device, mode="low_latency", graph_rows=(1, 2, 4, 8) if how == "graphs" else ())
    (finished,) = rank_pool.run(1, engine_job, settings, _waves(), deadline_s=DEADLINE_S[device])
    assert len(finished) == 2 * len(PROMPTS)
    _check(finished, device, most_ties=3)


@pytest.mark.parametrize(("name", "device"), each_device("one rank"))
def test_a_replayed_step_gives_the_bits_that_its_operations_give(name: str, device: str, rank_pool: RankPool) -> None:
    requests = [[greedy_request(index, prompt, NUM_TOKENS, return_logprob=True) for index, prompt in enumerate(PROMPTS)]]
    said = []
    for rows in ((), (8,)):
        # Padded to the same rows as the graph: a product's tiles may follow from how many there are.
        settings = _settings(demo_oracle.demo_model(), device, mode="low_latency", graph_rows=rows)
        (finished,) = rank_pool.run(1, engine_job, settings, requests, deadline_s=DEADLINE_S[device])
        said.append({rid: (each.tokens, [entry.logprob for entry in each.logprobs]) for rid, each in finished.items()})
    assert said[0] == said[1]


@pytest.mark.parametrize(("layout", "device"), each_device(*LAYOUTS, quick="dp2"))
def test_ranks_that_share_a_gpu_say_what_the_oracle_says(layout: str, device: str, rank_pool: RankPool) -> None:
    settings = _settings(demo_oracle.demo_model(), device, **LAYOUTS[layout])
    finished = merged(rank_pool.run(settings.tp, engine_job, settings, _waves(), deadline_s=DEADLINE_S[device]))
    assert len(finished) == 2 * len(PROMPTS)
    _check(finished, device, most_ties=3)


@pytest.mark.parametrize(("layout", "device"), each_device("dp2", "dp4", "tp2-none", quick="dp2"))
def test_experts_move_among_ranks_that_share_a_gpu(layout: str, device: str, rank_pool: RankPool) -> None:
    config = load_model_config(str(demo_oracle.demo_model().folder))
    sizes = LAYOUTS[layout]
    location = ExpertLocation.trivial(
        num_layers=len(config.sparse_layers), num_experts=config.n_routed_experts, num_slots=36, ep_size=sizes["tp"]
    )
    settings = _settings(
        demo_oracle.demo_model(),
        device,
        slots=SlotOptions(location=location, replica_choice="dynamic", movable=True),
        rebalance=RebalanceSettings(config=RebalanceConfig(num_iterations=2, cost_s_per_gib=1e-9)),
        **sizes,
    )
    requests = [greedy_request(index, prompt, NUM_TOKENS) for index, prompt in enumerate(PROMPTS)]
    results = rank_pool.run(settings.tp, rebalance_job, settings, [requests], deadline_s=DEADLINE_S[device])
    _check(merged([finished for finished, _, _ in results]), device, most_ties=2)
    assert [status.last_cause for _, status, _ in results] == [""] * settings.tp
    assert all(midway > 0 for _, _, midway in results), "no layer moved while requests ran"


SYMM = {
    f"dp{ranks}{'-graphs' * graphs}": {"tp": ranks, "dp": ranks, "graphs": graphs} for ranks in (2, 4) for graphs in (False, True)
}


@pytest.mark.parametrize(("layout", "device"), each_device(*SYMM))
def test_ranks_that_write_each_others_memory_on_one_gpu_say_what_collectives_say(
    layout: str, device: str, rank_pool: RankPool, tiny: Any
) -> None:
    """W8A8 experts, so that the oracle's numbers are not theirs; on a CPU the kernels run in the interpreter."""
    if device == "cpu" and not interpreter.AVAILABLE:
        pytest.skip("there is a GPU: the interpreter is off")
    model = tiny("fp8", hidden_size=128, moe_intermediate_size=128, num_hidden_layers=2, num_experts_per_tok=2)
    sizes = SYMM[layout]
    symm = replace(
        _settings(model, device, tp=sizes["tp"], dp=sizes["dp"], a2a="symm"),
        cap=8,
        fp8_activations=True,
        fp8_weights=True,
        graph_rows=(1, 4) if sizes["graphs"] else (),
    )
    requests = [greedy_request(index, [20 + index, *range(3, 3 + index)], 4) for index in range(6)]
    said = []
    for settings in (symm, replace(symm, a2a="torch", graph_rows=())):
        finished = merged(rank_pool.run(settings.tp, engine_job, settings, [requests], deadline_s=DEADLINE_S[device]))
        said.append([finished[index].tokens for index in range(len(requests))])
    differing = sum(one != other for one, other in zip(*said, strict=True))
    assert differing <= (1 if device != "cpu" else 0)
