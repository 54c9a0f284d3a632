"""The engine's CUDA path on a stand-in of the device: HF's tokens, and how often the CPU waits for the device in a decode step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import interpreter
import numpy as np
import pytest
from device_standin import DeviceRun, device_job, run_on_device
from engine_jobs import EngineSettings, engine_job, greedy_request, make_engine, run_waves
from rank_pool import RankPool
from tiny_models import TinyModel

from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.settings import SlotOptions
from moesaic.launch.engine.cuda_graphs import CudaGraphs
from moesaic.launch.engine.step import SplitThresholds

pytestmark = pytest.mark.skipif(not interpreter.AVAILABLE, reason="there is a GPU: no stand-in is needed")
Tiny = Callable[..., TinyModel]

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
"""Few and small kernels: the interpreter is slow."""
FP8 = {**SMALL, "hidden_size": 128, "moe_intermediate_size": 128}
PROMPTS = [[5, 6, 7], [9, 8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]


def settings_of(model: TinyModel, **options: Any) -> EngineSettings:
    shared = {"device": "cuda:0", "expert_backends": ("triton",), "page_size": 16, "num_pages": 16, "context_length": 128}
    return EngineSettings(model_path=str(model.folder), **{**shared, **options})


def on_cpu(settings: EngineSettings) -> EngineSettings:
    return replace(settings, device="cpu", expert_backends=("torch",), graph_rows=())


def check_waits(run: DeviceRun, *, graphed: bool = False, thread: str = "MainThread") -> None:
    """One in each decode step: where the results are brought in, not where forwards run, so that the next one is under way."""
    found = [waits for replays, waits in run.decode_waits if replays == graphed]
    assert found, "no decode step was seen"
    for waits in found:
        assert len(waits) == 1 and "result: event" in waits[0] and f"[{thread}]" in waits[0], waits


def test_greedy_tokens_are_the_oracles_and_a_decode_step_waits_once(tiny: Tiny) -> None:
    """For the tokens that it samples; all that goes to the device goes there without a wait. Lengths differ much, and two prompts
    have a page in common.
    """
    model = tiny("plain", **SMALL)
    waves = [[greedy_request(i, prompt, 4) for i, prompt in enumerate(PROMPTS)], [greedy_request(9, [*PROMPTS[1], 3], 2)]]
    run = run_on_device(settings_of(model), waves)
    assert run.finished[9].cached_tokens == 16
    expected = {0: model.greedy(PROMPTS[0], 4), 1: model.greedy(PROMPTS[1], 4), 9: model.greedy([*PROMPTS[1], 3], 2)}
    assert {rid: each.tokens for rid, each in run.finished.items()} == expected
    check_waits(run)


def test_sampling_penalties_and_logprobs_do_not_wait_more_often(tiny: Tiny) -> None:
    """Nor do steps in two micro-batches. And all give what they give on a CPU."""
    model = tiny("plain", **SMALL)
    requests = [
        greedy_request(0, [5, 6, 7], 5, logprob_start_len=0, top_logprobs_num=2, return_logprob=True),
        greedy_request(1, [5, 6, 8], 5, sampling={"temperature": 0.9, "seed": 3, "min_p": 0.01}),
        greedy_request(
            2,
            [5, 6, 9],
            5,
            sampling={"repetition_penalty": 1.3, "frequency_penalty": 0.2, "min_new_tokens": 2, "stop_token_ids": (7,)},
        ),
    ]
    settings = settings_of(model, split_from=SplitThresholds(decode=2))
    run, wanted = run_on_device(settings, [requests]), run_waves(make_engine(on_cpu(settings)), [requests])
    for rid, each in wanted.items():
        assert run.finished[rid].tokens == each.tokens
    assert len(wanted[0].logprobs) == 5 and len(run.finished[0].prompt_logprobs) == 3
    for got, want in zip(run.finished[0].logprobs, wanted[0].logprobs, strict=True):
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
        assert [token for token, _ in got.top] == [token for token, _ in want.top]
    check_waits(run, thread="forward")  # the next step's penalties count its tokens


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's, on rubbish in rows that only pad a block
def test_captured_steps_in_fp8_give_the_oracles_tokens(tiny: Tiny) -> None:
    """W8A8, experts in FP8: captured once, replayed with other rows."""
    model = tiny("fp8", **FP8)
    settings = settings_of(
        model, fp8_activations=True, fp8_weights=True, graph_rows=(2,), graphs=CudaGraphs, mode="low_latency", num_pages=8
    )
    run = run_on_device(settings, [[greedy_request(i, prompt, 3 + i) for i, prompt in enumerate(PROMPTS)]])
    expected = {i: model.greedy(prompt, 3 + i) for i, prompt in enumerate(PROMPTS)}
    assert {rid: each.tokens for rid, each in run.finished.items()} == expected
    check_waits(run, graphed=True)


@pytest.mark.parametrize(
    ("a2a", "graphs"),
    [
        pytest.param("deepep", False, marks=pytest.mark.whole),
        ("deepep", True),
        pytest.param("deepep_v2", True, marks=pytest.mark.whole),
    ],
)
def test_low_latency_exchanges_do_not_wait(tiny: Tiny, rank_pool: RankPool, a2a: str, graphs: bool) -> None:
    """Over DeepEP's stand-in behind the device's: who was late is read with the tokens."""
    model = tiny("plain", **{**SMALL, "hidden_size": 2048, "moe_intermediate_size": 16, "intermediate_size": 32})
    settings = settings_of(
        model,
        tp=2,
        dp=2,
        a2a=a2a,
        mode="low_latency",
        cap=32,
        chunk_tokens=32,
        graph_rows=(2,) if graphs else (),
        graphs=CudaGraphs,
    )
    requests = [greedy_request(i, [5, 6, 7 + i], 3) for i in range(2)]
    runs = rank_pool.run(2, device_job, settings, requests)
    expected = rank_pool.run(2, engine_job, on_cpu(settings), [requests])
    for run, wanted in zip(runs, expected, strict=True):
        assert {rid: each.tokens for rid, each in run.finished.items()} == {rid: each.tokens for rid, each in wanted.items()}
        check_waits(run, graphed=graphs)


@pytest.mark.whole
@pytest.mark.parametrize("choice", ["balanced", "activated"])
def test_captured_steps_choose_replicas_without_a_wait(choice: str, tiny: Tiny, rank_pool: RankPool) -> None:
    """By the counts of both ranks, which a replay gathers in every layer."""
    model = tiny("plain", **{**SMALL, "hidden_size": 2048, "moe_intermediate_size": 16, "intermediate_size": 32})
    location = ExpertLocation(physical_to_logical=np.array([[0, 1, 2, 3, 3, 2, 1, 0]]), num_experts=4, ep_size=2)
    settings = settings_of(
        model,
        tp=2,
        dp=2,
        a2a="deepep",
        mode="low_latency",
        cap=32,
        chunk_tokens=32,
        graph_rows=(2,),
        graphs=CudaGraphs,
        slots=SlotOptions(location=location, replica_choice=choice),
    )
    requests = [greedy_request(i, prompt, 4) for i, prompt in enumerate(PROMPTS)]
    runs = rank_pool.run(2, device_job, settings, requests)
    expected = rank_pool.run(2, engine_job, on_cpu(settings), [requests])
    for run, wanted in zip(runs, expected, strict=True):
        assert {rid: each.tokens for rid, each in run.finished.items()} == {rid: each.tokens for rid, each in wanted.items()}
        check_waits(run, graphed=True)
