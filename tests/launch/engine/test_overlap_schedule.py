"""Scheduling a step while the one before it runs changes nothing that a client sees, and really happens."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from engine_jobs import EngineSettings, Finished, greedy_request, make_engine
from rank_pool import RankPool
from tiny_models import TinyModel
from traffic_jobs import Arrival, Traffic, merged_traffic, penalised_greedy, traffic_job

from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.messages import AbortRequest, GenerateRequest, SamplingParams

Tiny = Callable[..., TinyModel]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "attention TP 2": {"tp": 2, "dp": 1, "ep": 2},
    "dp2-ep2": {"tp": 2, "dp": 2, "a2a": "torch"},
}
PENALTIES = SamplingParams(frequency_penalty=0.9, presence_penalty=0.4, repetition_penalty=1.3)
LENGTH = 12
STOPPED, STOPPED_AT_ONCE, LONG, PENALISED, SEEDED, ONE, NONE, HELD_BACK, AFTER_STOP, AFTER_LENGTH, ABORTED, COMPLETE = range(1, 13)


@cache
def _prompts() -> list[list[int]]:
    rng = random.Random(5)
    lengths = (13, 11, 14, 45, 9, 10, 12, 15, 11, 0, 0, 13, 10)
    return [[rng.randrange(2, 256) for _ in range(length)] for length in lengths]


@cache
def _greedy(model: TinyModel, prompt: tuple[int, ...], num_tokens: int = LENGTH) -> list[int]:
    return model.greedy(list(prompt), num_tokens)


def _answer(model: TinyModel, number: int) -> list[int]:
    return _greedy(model, tuple(_prompts()[number]))


def _traffic(model: TinyModel) -> list[Arrival]:
    """Everything at once at different stages, and what follows when some of it has ended."""
    prompts = _prompts()

    def ask(rid: int, num_tokens: int = LENGTH, **options: Any) -> GenerateRequest:
        return greedy_request(rid, prompts[rid], num_tokens, **options)

    def stop_at(rid: int, place: int) -> dict[str, Any]:
        return {"stop_token_ids": (_answer(model, rid)[place],)}

    at_start = [
        ask(0, return_logprob=True, top_logprobs_num=2),
        ask(STOPPED, sampling=stop_at(STOPPED, 4)),
        ask(STOPPED_AT_ONCE, sampling=stop_at(STOPPED_AT_ONCE, 0)),
        ask(LONG, 5, return_logprob=True, logprob_start_len=0),
        ask(PENALISED, sampling={"frequency_penalty": 0.9, "presence_penalty": 0.4, "repetition_penalty": 1.3}),
        ask(SEEDED, sampling={"temperature": 1.0, "top_p": 0.9, "seed": 17}),
        ask(ONE, 1),
        ask(NONE, 0, logprob_start_len=0),
        ask(HELD_BACK, sampling=stop_at(HELD_BACK, 2) | {"min_new_tokens": 6}),
        ask(ABORTED),
        ask(COMPLETE),
    ]
    # What follows hits the pages of what has just ended, answer included.
    after_stop = [*prompts[STOPPED], *_stopped(_answer(model, STOPPED), 4), 7]
    after_length = [*prompts[0], *_answer(model, 0), 9, 9]
    return [
        *(Arrival(message=request, home=request.rid) for request in at_start),
        Arrival(message=greedy_request(AFTER_STOP, after_stop, 4), home=STOPPED, follows=STOPPED),
        Arrival(message=greedy_request(AFTER_LENGTH, after_length, 4), home=0, follows=0),
        Arrival(message=AbortRequest(rid=ABORTED), home=ABORTED, follows=ABORTED, tokens=3),
        Arrival(message=AbortRequest(rid=COMPLETE, finish=True), home=COMPLETE, follows=COMPLETE, tokens=2),
    ]


def _stopped(tokens: list[int], place: int) -> list[int]:
    """Up to the first token that is the stop."""
    return tokens[: tokens.index(tokens[place]) + 1]


def _expected(model: TinyModel) -> dict[int, tuple[list[int], str | None]]:
    """(tokens, finish reason) by the oracle, of all that it can say."""
    prompts = _prompts()
    held = _answer(model, HELD_BACK)[2]
    by_rid = {
        0: (_answer(model, 0), "length"),
        STOPPED: (_stopped(_answer(model, STOPPED), 4), "stop"),
        STOPPED_AT_ONCE: (_answer(model, STOPPED_AT_ONCE)[:1], "stop"),
        LONG: (_answer(model, LONG)[:5], "length"),
        PENALISED: (penalised_greedy(model, prompts[PENALISED], LENGTH, PENALTIES), "length"),
        ONE: (_answer(model, ONE)[:1], "length"),
        NONE: ([], "length"),
        AFTER_STOP: (model.greedy([*prompts[STOPPED], *_stopped(_answer(model, STOPPED), 4), 7], 4), "length"),
        AFTER_LENGTH: (model.greedy([*prompts[0], *_answer(model, 0), 9, 9], 4), "length"),
    }
    assert held in _answer(model, HELD_BACK)[:6], "the stop would come too early"
    return by_rid


def _check(model: TinyModel, finished: dict[int, Finished]) -> None:
    for rid, (tokens, reason) in _expected(model).items():
        assert (finished[rid].tokens, finished[rid].finish_reason) == (tokens, reason), f"request {rid}"
    for rid, most in ((ABORTED, "abort"), (COMPLETE, None)):
        tokens = finished[rid].tokens
        assert finished[rid].finish_reason == most
        assert 2 <= len(tokens) < LENGTH and tokens == _answer(model, rid)[: len(tokens)]
    logprobs = model.logits([*_prompts()[0], *finished[0].tokens]).log_softmax(-1)[len(_prompts()[0]) - 1 :]
    found = [entry.logprob for entry in finished[0].logprobs]
    assert found == pytest.approx([float(logprobs[i, token]) for i, token in enumerate(finished[0].tokens)], abs=1e-4)
    found = [entry.logprob for entry in finished[LONG].prompt_logprobs[1:]]
    assert found == pytest.approx(model.prompt_logprobs(_prompts()[LONG]), abs=1e-4)
    assert len(finished[HELD_BACK].tokens) >= 6


def _run(settings: EngineSettings, arrivals: list[Arrival], pool: RankPool) -> tuple[dict[int, Finished], int]:
    results = [traffic_job(0, settings, arrivals)] if settings.tp == 1 else pool.run(settings.tp, traffic_job, settings, arrivals)
    return merged_traffic(settings, results), sum(retracted for _, retracted in results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clients_see_the_same_with_and_without_overlap(layout: str, tiny: Tiny, rank_pool: RankPool) -> None:
    """Stops, length ends, penalties, seeded sampling, log probabilities, chunked prompts, aborts, hits on what has just ended."""
    model = tiny("plain")
    settings = EngineSettings(model_path=str(model.folder), chunk_tokens=16, **LAYOUTS[layout])

    overlapped, _ = _run(settings, _traffic(model), rank_pool)
    sequential, _ = _run(replace(settings, overlap_schedule=False), _traffic(model), rank_pool)

    for finished in (overlapped, sequential):
        _check(model, finished)
        # All full pages of what is known to be computed: prompt and answer but for its last token.
        assert finished[AFTER_LENGTH].cached_tokens == (len(_prompts()[0]) + LENGTH - 1) // 4 * 4
    for rid in overlapped.keys() - {ABORTED, COMPLETE}:
        one, other = overlapped[rid], sequential[rid]
        assert (one.tokens, one.finish_reason, one.cached_tokens) == (other.tokens, other.finish_reason, other.cached_tokens)
        assert [entry.logprob for entry in one.logprobs] == pytest.approx([entry.logprob for entry in other.logprobs], abs=1e-4)


@pytest.mark.parametrize(
    ("layout", "overlap_schedule", "num_host_pages"),
    [("tp1", True, 0), ("tp1", False, 9), ("attention TP 2", True, 9), ("attention TP 2", False, 0)],
)
def test_retraction_loses_nothing_while_tokens_are_under_way(
    layout: str, overlap_schedule: bool, num_host_pages: int, tiny: Tiny, rank_pool: RankPool
) -> None:
    """Room for few sequences: the same traffic, with stops, penalties, seeds and aborts, is sent back and resumes. Host memory has
    room for some of their KV, or there is none.
    """
    model = tiny("plain")
    roomy = EngineSettings(model_path=str(model.folder), overlap_schedule=overlap_schedule, **LAYOUTS[layout])
    tight = replace(roomy, num_pages=15, max_running=8, num_host_pages=num_host_pages)

    finished, num_retracted = _run(tight, _traffic(model), rank_pool)

    assert num_retracted > 0, "the test must put the engine under pressure"
    _check(model, finished)
    assert finished[SEEDED].tokens == _run(roomy, _traffic(model), rank_pool)[0][SEEDED].tokens


@pytest.mark.parametrize("overlap_schedule", [True, False])
def test_an_abort_at_any_step_ends_that_request_and_disturbs_no_other(overlap_schedule: bool, tiny: Tiny) -> None:
    """Two slots and a chunked prompt: the one that ends is waiting, half computed, decoding, or has just ended; its slot and pages
    go to the one that waits while a forward with its rows is under way.
    """
    model = tiny("plain")
    settings = EngineSettings(
        model_path=str(model.folder), chunk_tokens=8, num_pages=24, max_running=2, overlap_schedule=overlap_schedule
    )
    traffic = Traffic(make_engine(settings))
    prompts = [_prompts()[LONG][:20], _prompts()[1], _prompts()[2]]
    stages: set[int] = set()
    for step in range(14):
        for finish in (False, True):
            first = 100 * (step + 1) + 10 * finish
            for i, prompt in enumerate(prompts):
                traffic.apply(greedy_request(first + i, [*prompt, step + 2], 8))
            start = traffic.num_steps
            traffic.run([Arrival(message=AbortRequest(rid=first, finish=finish), step=start + step)])
            ended = traffic.finished.pop(first, Finished())
            stages.add(len(ended.tokens))
            answers = [_greedy(model, (*prompt, step + 2), 8) for prompt in prompts]
            assert ended.tokens == answers[0][: len(ended.tokens)]
            assert [traffic.finished.pop(first + i).tokens for i in (1, 2)] == answers[1:]
            traffic.check_memory()
    assert stages == set(range(9)), "the abort came before the first token, after the last, and after each"


@pytest.mark.parametrize("overlap_schedule", [True, False])
@pytest.mark.parametrize(("seed", "num_host_pages"), [(1, 0), (2, 10)])
def test_rough_traffic_gives_the_oracles_tokens_and_leaks_no_page(
    seed: int, num_host_pages: int, overlap_schedule: bool, tiny: Tiny
) -> None:
    """Shared prefixes, stops, aborts and memory pressure at random; retracted KV kept in host memory, some of it, or none."""
    model, rng = tiny("plain"), random.Random(seed)
    settings = EngineSettings(
        model_path=str(model.folder),
        chunk_tokens=12,
        num_pages=18,
        num_host_pages=num_host_pages,
        max_running=6,
        overlap_schedule=overlap_schedule,
    )
    traffic = Traffic(make_engine(settings))
    base = _prompts()[LONG]
    expected: dict[int, list[int]] = {}
    aborted: set[int] = set()
    arrivals = []
    for rid in range(60):
        prompt = [*base[: rng.choice((3, 9, 16, 30))], 2 + rid % 3]
        answer = _greedy(model, tuple(prompt), 28)
        stop = rng.choice(answer) if rng.random() < 0.4 else None
        step = rid and rid + rng.randrange(4)
        request = greedy_request(rid, prompt, 28, sampling={"stop_token_ids": () if stop is None else (stop,)})
        expected[rid] = answer if stop is None else answer[: answer.index(stop) + 1]
        arrivals.append(Arrival(message=request, step=step))
        if rng.random() < 0.25:
            aborted.add(rid)
            arrivals.append(Arrival(message=AbortRequest(rid=rid), step=step + 1 + rng.randrange(40)))

    traffic.run(arrivals)

    for rid, tokens in expected.items():
        found = traffic.finished[rid]
        assert found.tokens == (tokens[: len(found.tokens)] if rid in aborted else tokens), f"request {rid}"
    reasons = [entry.finish_reason for entry in traffic.finished.values()]
    assert all(reasons.count(reason) > 5 for reason in ("stop", "length", "abort"))
    retraction = traffic.engine.load(0).retraction
    assert traffic.engine.scheduler.num_retracted > 0
    assert (retraction is not None and retraction.num_restored_tokens > 0) == (num_host_pages > 0)
    traffic.check_memory()


class _Held:
    """An engine's forwards, each held until it is let go."""

    def __init__(self, engine: RankEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let_go = threading.Semaphore(0)
        self.threads: list[int] = []
        forward = engine.runner.forward

        def held(*arguments: Any) -> Any:
            self.threads.append(threading.get_ident())
            assert self.let_go.acquire(timeout=10), "a forward was never let go"
            return forward(*arguments)

        monkeypatch.setattr(engine.runner, "forward", held)


def test_a_step_returns_while_its_forward_runs_and_its_tokens_come_with_the_next(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("plain")
    engine = make_engine(EngineSettings(model_path=str(model.folder)))
    held, traffic = _Held(engine, monkeypatch), Traffic(engine)
    traffic.apply(greedy_request(0, _prompts()[0], 3))

    first = traffic.step()  # returns, though the forward has not been let go
    assert first.step.extends and not traffic.finished
    for num_tokens in (1, 2):
        held.let_go.release()
        assert not traffic.step().step.idle  # launches the next one, then waits for the one before it
        assert len(traffic.finished[0].tokens) == num_tokens
    held.let_go.release()
    assert traffic.step().step.idle, "nothing is scheduled for a request whose last token is under way"

    assert traffic.finished[0].tokens == _answer(model, 0)[:3]
    assert len(held.threads) == 3 and threading.get_ident() not in held.threads


def test_without_overlap_each_step_brings_its_own_tokens_and_runs_where_it_is_called(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("plain")
    engine = make_engine(EngineSettings(model_path=str(model.folder), overlap_schedule=False))
    held, traffic = _Held(engine, monkeypatch), Traffic(engine)
    traffic.apply(greedy_request(0, _prompts()[0], 3))
    for num_tokens in (1, 2, 3):
        held.let_go.release()
        traffic.step()
        assert len(traffic.finished[0].tokens) == num_tokens
    assert traffic.step().step.quiet
    assert held.threads == [threading.get_ident()] * 3
