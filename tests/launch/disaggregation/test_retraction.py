"""A decode engine short of memory: what steps back keeps its KV in host memory and goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from engine_jobs import EngineSettings
from pd_engines import Engines, abort, pd_engines
from tiny_models import TinyModel

PROMPTS = [[index, *range(60, 70)] for index in range(3)] + [[7, 7, 7, 7, 7, 7, 7, 7, 40, 41]]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def model(tiny: Callable[..., TinyModel]) -> TinyModel:
    return tiny("plain")


@pytest.fixture(scope="module")
def answers(model: TinyModel) -> list[list[int]]:
    return [model.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.fixture
def engines(model: TinyModel) -> Iterator[Engines]:
    """Pages of 4 tokens, 16 on each device, where the four requests would need 36 at their ends; as many in host memory."""
    settings = EngineSettings(model_path=str(model.folder), num_pages=16, num_host_pages=16, chunk_tokens=8, context_length=64)
    with pd_engines(settings) as engines:
        yield engines
        engines.step_to_rest()
        assert engines.nothing_held()


def test_what_was_retracted_goes_on_without_being_computed_again(engines: Engines, answers: list[list[int]]) -> None:
    engines.send(*(engines.request(rid, prompt, NUM_TOKENS) for rid, prompt in enumerate(PROMPTS)))
    engines.step_to_rest()

    scheduler, retraction = engines.decode.engine.scheduler, engines.decode.engine.load(0).retraction
    assert retraction is not None
    assert retraction.num_offloaded_reqs == scheduler.num_retracted > 0
    assert 0 < retraction.num_restored_tokens <= retraction.num_offloaded_tokens
    assert engines.decode.num_extends == 0
    assert [engines.decode.finished[rid].tokens for rid in range(len(PROMPTS))] == answers


@pytest.mark.parametrize(("restored", "num_steps"), [(False, 0), (False, 2), (True, 0), (True, 1), (True, 3)])
def test_an_abort_of_a_retracted_request_leaks_nothing(
    engines: Engines, answers: list[list[int]], restored: bool, num_steps: int
) -> None:
    """Its KV is in host memory, is being put back while a step is under way, or has been."""
    scheduler = engines.decode.engine.scheduler
    engines.send(*(engines.request(rid, prompt, NUM_TOKENS) for rid, prompt in enumerate(PROMPTS)))
    engines.step_until(lambda: scheduler.num_waiting)
    victim = scheduler._waiting.head
    assert victim is not None and victim.kept is not None and engines.decode.used_host_pages >= len(victim.kept.host_pages)
    if restored:
        engines.step_until(lambda: victim.slot >= 0)
    for _ in range(num_steps):
        engines.decode.step()
    abort(engines.decode, victim.rid)
    engines.step_to_rest()

    finished = engines.decode.finished
    assert finished[victim.rid].finish_reason == "abort"
    for rid, answer in enumerate(answers):
        tokens = finished[rid].tokens
        assert tokens == (answer[: len(tokens)] if rid == victim.rid else answer)
