"""An operation that fails ends its step's requests, saying what, where and on which rank; nothing else is disturbed."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from engine_jobs import EngineSettings, Finished, greedy_request, make_engine
from failure_jobs import (
    AFTER,
    BOOM,
    NUM_TOKENS,
    SURVIVOR,
    VICTIMS,
    Fault,
    Saboteur,
    failure_job,
    lost_collective_job,
    poisoned_token_job,
)
from rank_pool import RankPool
from tiny_models import TinyModel
from traffic_jobs import Arrival, Traffic

from moesaic.launch.engine.step import SplitThresholds
from moesaic.overlap.operations import OperationError

Tiny = Callable[..., TinyModel]
DP2, TP2 = {"tp": 2, "dp": 2, "ep": 2}, {"tp": 2, "dp": 1, "ep": 2}
SPLIT = {"split_from": SplitThresholds(prefill=2, decode=2)}
SINGLE = {"single_batch_overlap": True}
CASES: dict[str, dict[str, Any]] = {
    "straight-torch-auto": {**DP2, "a2a": "torch"},
    "straight-none": {**DP2},
    "straight-torch-in-sequence": {**DP2, "a2a": "torch", "overlap_schedule": False},
    "two-batch-torch-auto": {**DP2, **SPLIT, "a2a": "torch"},
    "two-batch-none": {**DP2, **SPLIT},
    "single-batch-torch-normal": {**DP2, **SINGLE, "a2a": "torch", "mode": "normal"},
    "single-batch-torch-low_latency": {**DP2, **SINGLE, "a2a": "torch", "mode": "low_latency"},
    "single-batch-none": {**DP2, **SINGLE},
    "attention TP-torch": {**TP2, "a2a": "torch"},
    "attention TP-none-two-batch": {**TP2, **SPLIT},
}
WHOLE = ("experts",)
HALVES = ("gate_up", "down_first", "down_second")


@cache
def _prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(2, 256) for _ in range(length)] for length in (9, 14, 6, 11, 5, 13)]


def _faults(case: dict[str, Any], turn: int) -> list[Fault]:
    """Every operation that can be left out, in leading, first and last layer. Whether it fails before or after its work, in prefill
    or decode, in the first or second micro-batch: one of each, all of them over the turns.
    """
    attention_tp = case["dp"] == 1
    split = "split_from" in case
    names = [("attention_prepare", 0), ("attention_prepare", 2), ("gate", 1)]
    names += [(name, 1 + i % 2) for i, name in enumerate(HALVES if "single_batch_overlap" in case else WHOLE)]
    if not attention_tp:
        names += [("attention_core", 0), ("attention_core", 1), ("feed_forward", 0), ("output", 2)]
    if not attention_tp or case.get("a2a") == "torch":
        names.append(("shared_expert", 2))
    return [
        Fault(
            operation=name,
            layer=layer,
            rank=1,
            after=(i + turn) % 2 == 0,
            decode=(i // 2 + turn) % 2 == 0,
            occurrence=(i // 4 + turn) % 2 if split and layer else 0,
        )
        for i, (name, layer) in enumerate(names)
    ]


@pytest.mark.parametrize("name", CASES)
def test_only_the_requests_of_the_step_end_and_say_what_failed_where(name: str, tiny: Tiny, rank_pool: RankPool) -> None:
    model, case = tiny("plain"), CASES[name]
    settings = EngineSettings(model_path=str(model.folder), num_pages=32, **case)
    faults, prompts = _faults(case, list(CASES).index(name)), _prompts()
    answers = [model.greedy(prompt, NUM_TOKENS) for prompt in prompts]

    results = rank_pool.run(2, failure_job, settings, faults, prompts)

    for number, fault in enumerate(faults):
        half = f" in micro-batch {fault.occurrence}" if "split_from" in case and fault.layer else ""
        words = f"operation {fault.operation} of layer {fault.layer} failed{half} on rank 1: "
        for dp_rank in range(settings.dp):
            finished = results[dp_rank][number]
            first, own = 10 * dp_rank, answers[dp_rank * 3 :][:3]
            for i in VICTIMS:
                entry = finished[first + i]
                assert (entry.finish_reason, len(entry.tokens)) == ("abort", 2 if fault.decode else 0), fault
                assert entry.tokens == own[i][: len(entry.tokens)]
                assert entry.message == words + (BOOM if dp_rank == 1 else "the log of that rank says why")
            _check_whole(finished, {first + SURVIVOR: own[2]} | {first + i: own[i - AFTER[0]] for i in AFTER})


def _check_whole(finished: dict[int, Finished], expected: dict[int, list[int]]) -> None:
    for rid, tokens in expected.items():
        assert (finished[rid].tokens, finished[rid].finish_reason) == (tokens, "length"), f"request {rid}: {finished[rid]}"


@pytest.mark.parametrize("name", ["straight-torch-auto", "two-batch-torch-auto", "two-batch-none", "single-batch-torch-normal"])
def test_logits_that_are_no_numbers_end_their_own_request_alone(name: str, tiny: Tiny, rank_pool: RankPool) -> None:
    """The bad token is in a whole prompt or an early chunk; others run beside those requests, and get their pages after them."""
    model = tiny("plain")
    prompts = _prompts()
    answers = [model.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    bad = next(token for token in range(2, 256) if not any(token in row for row in [*prompts, *answers]))
    settings = EngineSettings(model_path=str(model.folder), num_pages=20, chunk_tokens=12, **CASES[name])
    good = [greedy_request(i, prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)]
    ill = [greedy_request(10 + i, [bad if place == 3 else 9 for place in range(5 + 13 * i)], NUM_TOKENS) for i in range(2)]
    again = [greedy_request(20 + i, prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)]

    results = rank_pool.run(2, poisoned_token_job, settings, bad, [[*ill, *good], again])

    finished = {rid: entry for found, _ in results for rid, entry in found.items()}
    for request in ill:
        entry = finished[request.rid]
        assert (entry.finish_reason, entry.tokens) == ("abort", [])
        assert entry.message == "the model gave logits with NaN or inf for this request"
    for start in (0, 20):
        _check_whole(finished, {start + i: tokens for i, tokens in enumerate(answers)})
    assert not any(poisoned for _, poisoned in results), "NaN was left in a page"


@pytest.mark.parametrize(
    ("backend", "name", "operation"), [("torch", "dispatch rows", "dispatch_b"), ("none", "combine", "combine_b")]
)
def test_a_failed_collective_ends_the_rank_and_says_where(
    backend: str, name: str, operation: str, tiny: Tiny, rank_pool: RankPool
) -> None:
    settings = EngineSettings(model_path=str(tiny("plain").folder), a2a=backend, overlap_schedule=False, **DP2)
    results = rank_pool.run(2, lost_collective_job, settings, name)
    for rank, (message, fatal) in enumerate(results):
        assert message == f"operation {operation} of layer 1 failed on rank {rank}: Connection reset by peer"
        assert fatal


@pytest.mark.parametrize("overlap_schedule", [True, False])
def test_an_operation_that_others_depend_on_ends_the_rank(overlap_schedule: bool, tiny: Tiny) -> None:
    engine = make_engine(EngineSettings(model_path=str(tiny("plain").folder), a2a="torch", overlap_schedule=overlap_schedule))
    Saboteur(engine).arm(Fault(operation="combine_a", layer=2, rank=0, after=False, decode=False), 1)
    engine.apply(greedy_request(0, [5, 6, 7], 4))
    with pytest.raises(OperationError, match=f"^operation combine_a of layer 2 failed on rank 0: {BOOM}$") as caught:
        for _ in range(2):
            engine.step()
    assert caught.value.fatal
    engine.close()


@pytest.mark.parametrize(("weight", "operation"), [("_embedding", "embed"), ("_final_norm", "head")])
def test_a_failure_before_or_after_the_layers_ends_its_step_too(
    weight: str, operation: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("plain")
    engine = make_engine(EngineSettings(model_path=str(model.folder)))
    traffic, prompt = Traffic(engine), _prompts()[0]
    with monkeypatch.context() as patched:
        broken = {"embed": engine.runner.model._embedding[:1], "head": None}[operation]
        patched.setattr(engine.runner.model, weight, broken)
        traffic.run([Arrival(message=greedy_request(0, prompt, NUM_TOKENS))])
    traffic.run([Arrival(message=greedy_request(1, prompt, NUM_TOKENS))])
    assert (traffic.finished[0].finish_reason, traffic.finished[0].tokens) == ("abort", [])
    assert str(traffic.finished[0].message).startswith(f"operation {operation} failed on rank 0: ")
    _check_whole(traffic.finished, {1: model.greedy(prompt, NUM_TOKENS)})
