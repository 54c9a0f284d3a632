"""The engine of one rank on a real tiny model: memory pressure, finishing, sampling and logprobs. Oracle: HF transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_jobs import EngineSettings, Finished, collect, greedy_request, make_engine, run_waves
from rank_pool import RankPool
from tiny_models import TinyModel
from traffic_jobs import Arrival, traffic_job

from moesaic.launch.engine.messages import AbortRequest, Control, GenerateRequest, every_output

Tiny = Callable[..., TinyModel]


def _prompts(count: int, length: int = 12) -> list[list[int]]:
    return [[2 + (31 * i + 7 * j) % 250 for j in range(length + i % 5)] for i in range(count)]


def test_retraction_loses_nothing(tiny: Tiny) -> None:
    """Room for about three of eight sequences at their full length: some must step back, all tokens stay right."""
    model = tiny()
    settings = EngineSettings(model_path=str(model.folder), num_pages=26, max_running=8)
    engine = make_engine(settings)
    prompts = _prompts(8)
    finished = run_waves(engine, [[greedy_request(i, prompt, 20, logprob_start_len=0) for i, prompt in enumerate(prompts)]])
    assert engine.scheduler.num_retracted > 0, "the test must put the engine under pressure"
    for i, prompt in enumerate(prompts):
        assert finished[i].tokens == model.greedy(prompt, 20)
        assert len(finished[i].prompt_logprobs) == len(prompt), "prompt logprobs come once, whole"
    assert engine.scheduler.cache.available_pages() == 26


def test_a_full_dp_rank_does_not_stop_the_others(tiny: Tiny, rank_pool: RankPool) -> None:
    """DP rank 0 has more long work than memory, queues and retracts; DP rank 1's requests end in the very steps as without it."""
    model = tiny()
    settings = EngineSettings(model_path=str(model.folder), tp=2, dp=2, a2a="torch", num_pages=14, max_running=4)
    long = [Arrival(message=greedy_request(2 * i, _prompts(6)[i], 24), home=0) for i in range(6)]
    short = [Arrival(message=greedy_request(2 * i + 1, [5 + i, 6], 3 + i), home=1, step=i) for i in range(6)]
    (crowded, num_retracted), (beside, _) = rank_pool.run(2, traffic_job, settings, [*long, *short])
    _, (alone, _) = rank_pool.run(2, traffic_job, settings, short)

    assert num_retracted > 0
    for i in range(6):
        assert crowded[2 * i].tokens == model.greedy(_prompts(6)[i], 24)
        assert beside[2 * i + 1].tokens == model.greedy([5 + i, 6], 3 + i)
    assert {rid: entry.last_step for rid, entry in beside.items()} == {rid: entry.last_step for rid, entry in alone.items()}
    assert max(entry.last_step for entry in crowded.values()) > 3 * max(entry.last_step for entry in beside.values())


def test_a_request_that_can_never_fit_is_answered_at_once(tiny: Tiny) -> None:
    engine = make_engine(EngineSettings(model_path=str(tiny().folder), num_pages=8))
    finished = run_waves(engine, [[greedy_request(1, [3] * 30, 20), greedy_request(2, [3, 4], 2)]])
    assert finished[1].finish_reason == "abort"
    assert "50 tokens" in str(finished[1].message) and "has 32" in str(finished[1].message)
    assert finished[2].finish_reason == "length"


def test_aborts_at_every_stage_free_everything(tiny: Tiny) -> None:
    settings = EngineSettings(model_path=str(tiny().folder), chunk_tokens=8, num_pages=64, max_running=2)
    engine = make_engine(settings)
    finished: dict[int, Finished] = {}
    for rid in range(5):
        engine.apply(greedy_request(rid, _prompts(1, 20)[0], 30))
    collect(finished, engine.step().outputs)  # request 0 is half prefilled, the others wait
    engine.apply(AbortRequest(rid=0))
    engine.apply(AbortRequest(rid=4))
    for _ in range(4):
        result = engine.step()  # request 1 decodes by now
        collect(finished, every_output(result.outputs, result.rids, result.tokens))
    assert finished[1].tokens
    for rid in (1, 2, 3, 99):
        engine.apply(AbortRequest(rid=rid))
    for quiet in (False, True):  # a forward that was under way ends first; its tokens are nobody's
        result = engine.step()
        collect(finished, every_output(result.outputs, result.rids, result.tokens))
        assert result.step.quiet == quiet
    assert {rid: entry.finish_reason for rid, entry in finished.items()} == dict.fromkeys(range(5), "abort")
    assert engine.scheduler.cache.available_pages() == 64


def test_finish_reasons(tiny: Tiny) -> None:
    model = tiny()
    prompt = _prompts(1)[0]
    tokens = model.greedy(prompt, 10)
    stop = tokens[4]
    first = tokens.index(stop)
    requests = [
        greedy_request(1, prompt, 10, sampling={"stop_token_ids": (stop,)}),
        greedy_request(2, prompt, 10),
        greedy_request(3, prompt, 0, logprob_start_len=0),
        greedy_request(4, prompt, 10, sampling={"stop_token_ids": (stop,), "min_new_tokens": 10}),
    ]
    finished = run_waves(make_engine(EngineSettings(model_path=str(model.folder))), [requests])
    assert (finished[1].finish_reason, finished[1].tokens) == ("stop", tokens[: first + 1])
    assert (finished[2].finish_reason, finished[2].tokens) == ("length", tokens)
    assert (finished[3].finish_reason, finished[3].tokens) == ("length", [])
    assert len(finished[3].prompt_logprobs) == len(prompt)
    assert len(finished[4].tokens) == 10 and stop not in finished[4].tokens


def test_output_logprobs_equal_the_oracle(tiny: Tiny) -> None:
    model = tiny()
    prompt = _prompts(1)[0]
    request = greedy_request(1, prompt, 5, return_logprob=True, top_logprobs_num=3)
    finished = run_waves(make_engine(EngineSettings(model_path=str(model.folder))), [[request]])[1]
    logprobs = model.logits(prompt + finished.tokens).log_softmax(-1)[len(prompt) - 1 :]
    for step, entry in enumerate(finished.logprobs):
        assert entry.token_id == finished.tokens[step]
        assert entry.logprob == pytest.approx(float(logprobs[step, entry.token_id]), abs=1e-4)
        values, ids = logprobs[step].topk(3)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def _sampled(rid: int, prompt: list[int], seed: int) -> GenerateRequest:
    return greedy_request(rid, prompt, 12, sampling={"temperature": 1.0, "top_p": 0.95, "seed": seed})


def test_seeded_sampling_is_the_same_alone_in_a_crowd_and_after_retraction(tiny: Tiny) -> None:
    folder = str(tiny().folder)
    prompts = _prompts(8)
    alone = [run_waves(make_engine(EngineSettings(model_path=folder)), [[_sampled(0, p, i)]])[0] for i, p in enumerate(prompts)]
    engine = make_engine(EngineSettings(model_path=folder, num_pages=20, max_running=8))
    crowd = run_waves(engine, [[_sampled(i, p, i) for i, p in enumerate(prompts)]])
    assert engine.scheduler.num_retracted > 0
    assert [crowd[i].tokens for i in range(8)] == [entry.tokens for entry in alone]
    assert len({tuple(entry.tokens) for entry in alone}) == 8


def test_penalties_follow_the_request_through_the_engine(tiny: Tiny) -> None:
    """A frequency penalty beyond the logits' range forbids every repetition."""
    request = greedy_request(1, [3, 4], 40, sampling={"frequency_penalty": 1000.0})
    tokens = run_waves(make_engine(EngineSettings(model_path=str(tiny().folder))), [[request]])[1].tokens
    assert len(set(tokens)) == 40


def test_priority_and_longest_prefix_go_first(tiny: Tiny) -> None:
    folder = str(tiny().folder)
    shared = _prompts(1, 40)[0]
    engine = make_engine(EngineSettings(model_path=folder, max_running=1, policy="lpm"))
    run_waves(engine, [[greedy_request(0, shared, 1)]])
    order: list[int] = []
    for request in (greedy_request(1, [9] * 12, 1), greedy_request(2, shared[:20], 1), greedy_request(3, [8] * 9, 1, priority=5)):
        engine.apply(request)
    while not (result := engine.step()).step.quiet:
        order += [output.rid for output in result.outputs]
    assert order == [3, 2, 1]


def test_controls_wait_until_every_rank_has_them(tiny: Tiny) -> None:
    engine = make_engine(EngineSettings(model_path=str(tiny().folder)))
    run_waves(engine, [[greedy_request(1, [3] * 20, 1)]])
    assert engine.scheduler.cache.num_cached_pages > 0
    engine.control(Control(control_id=7, command="flush_cache"))
    result = engine.step()
    assert [(reply.control_id, reply.ok) for reply in result.replies] == [(7, True)]
    assert engine.scheduler.cache.num_cached_pages == 0
    engine.control(Control(control_id=8, command="shutdown"))
    engine.step()
    assert engine.step().step.stop
