"""The whole engine over memory that its ranks share: prompts by collectives, decode steps by the kernels, in the interpreter.

And experts that keep their FP8 weights, while they move from rank to rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import interpreter
import pytest
from engine_jobs import EngineSettings, engine_job, greedy_request, merged, rebalance_job
from rank_pool import RankPool
from tiny_models import TinyModel

from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.settings import RebalanceSettings, SlotOptions
from moesaic.launch.engine.step import SplitThresholds

SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}


@pytest.mark.skipif(not interpreter.AVAILABLE, reason="there is a GPU: the interpreter is off")
@pytest.mark.parametrize(("split", "graphs"), [(False, False), (True, False), (False, True)])
def test_tokens_are_those_of_the_engine_over_collectives(
    rank_pool: RankPool, tiny: Callable[..., TinyModel], split: bool, graphs: bool
) -> None:
    """`graphs`: padded decode steps that are repeated as captured, with blank rows that nobody gets."""
    model = tiny("fp8", **SIZES, num_experts_per_tok=2, num_hidden_layers=2)
    prompts = [[5, 6, 7], [9, 8], [3, 4, 5, 6], [20]]
    tokens = []
    for a2a in ("symm", "torch"):
        settings = EngineSettings(
            model_path=str(model.folder),
            tp=2,
            dp=2,
            a2a=a2a,
            cap=4,
            fp8_activations=True,
            fp8_weights=True,
            split_from=SplitThresholds(decode=2) if split else SplitThresholds(),
            graph_rows=(1, 4) if graphs and a2a == "symm" else (),
        )
        wave = [greedy_request(index, prompt, 4) for index, prompt in enumerate(prompts)]
        finished = merged(rank_pool.run(2, engine_job, settings, [wave], deadline_s=200))
        tokens.append([finished[index].tokens for index in range(len(prompts))])
    assert all(len(each) == 4 for each in tokens[0])
    assert tokens[0] == tokens[1]


def test_fp8_experts_take_their_scales_along_when_they_move(rank_pool: RankPool, tiny: Callable[..., TinyModel]) -> None:
    model = tiny("fp8", hidden_size=128, moe_intermediate_size=128)
    place = ExpertLocation.trivial(num_layers=2, num_experts=16, num_slots=20, ep_size=2)
    still = EngineSettings(
        model_path=str(model.folder),
        tp=2,
        dp=2,
        a2a="torch",
        fp8_activations=True,
        fp8_weights=True,
        slots=SlotOptions(location=place),
    )
    moving = replace(
        still,
        slots=SlotOptions(location=place, movable=True),
        rebalance=RebalanceSettings(config=RebalanceConfig(num_iterations=2, cost_s_per_gib=1e-9), algorithm="auto"),
    )
    wave = [greedy_request(index, prompt, 12) for index, prompt in enumerate([[5, 6, 7], [9, 8], [3, 4, 5, 6]])]
    expected = merged(rank_pool.run(2, engine_job, still, [wave]))
    results = rank_pool.run(2, rebalance_job, moving, [wave])
    finished = merged([tokens for tokens, _, _ in results])
    assert all(midway > 0 for _, _, midway in results), "no layer moved while requests ran"
    assert [finished[index].tokens for index in range(3)] == [expected[index].tokens for index in range(3)]
