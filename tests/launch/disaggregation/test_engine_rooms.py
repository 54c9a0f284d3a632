"""Rooms in the real engine: chunks go out while the next computes, aborts leak nothing, no page is written to after its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_jobs import EngineSettings
from pd_engines import Engines, abort, pd_engines
from tiny_models import TinyModel
from torch import Tensor

from moesaic.overlap.operations import Operation, OperationError

PROMPT = list(range(20, 50))


@pytest.fixture(scope="module")
def model(tiny: Callable[..., TinyModel]) -> TinyModel:
    return tiny("plain")


@pytest.fixture
def engines(model: TinyModel) -> Iterator[Engines]:
    """Pages of 4 tokens, 16 on each side; chunks of 8 tokens."""
    with pd_engines(EngineSettings(model_path=str(model.folder), num_pages=16, chunk_tokens=8, context_length=64)) as engines:
        yield engines
        engines.backend.held = False
        engines.backend.release()
        engines.step_to_rest()
        assert engines.nothing_held()


def test_pages_travel_while_later_chunks_compute(engines: Engines, model: TinyModel) -> None:
    engines.backend.held = True
    engines.send(engines.request(1, PROMPT, 4))
    engines.step_until(lambda: engines.backend.reads)
    assert engines.prefill.stages() == ["COMPUTE"], "the prompt's last chunk has not been computed"
    engines.backend.held = False
    engines.backend.release()
    engines.step_to_rest()

    assert engines.decode.finished[1].tokens == model.greedy(PROMPT, 4)
    assert (engines.prefill.finished[1].tokens, engines.prefill.finished[1].finish_reason) == ([], "length")


def test_the_handover_is_timed_from_the_last_chunk_to_the_first_token(engines: Engines) -> None:
    engines.backend.held = True
    engines.send(engines.request(1, PROMPT, 4))
    engines.step_until(lambda: engines.prefill.stages() == ["INFLIGHT"])
    time.sleep(0.05)
    engines.backend.held = False
    engines.backend.release()
    engines.step_to_rest()

    assert 50 <= engines.decode.rooms.load().handover_ms < 5000


def test_prefixes_are_found_on_both_sides(engines: Engines, model: TinyModel) -> None:
    engines.send(engines.request(1, PROMPT, 3))
    engines.step_to_rest()
    engines.backend.held = True
    longer = [*PROMPT, 7, 8]
    engines.send(engines.request(2, longer, 3))
    engines.step_until(lambda: engines.backend.reads)
    engines.backend.held = False
    engines.backend.release()
    engines.step_to_rest()

    assert engines.decode.finished[2].tokens == model.greedy(longer, 3)
    assert engines.prefill.finished[2].cached_tokens == 28
    stats = engines.decode.rooms._last  # type: ignore[union-attr]
    assert stats is not None and stats.num_pages == 1, "what decode has cached is not fetched again"


def test_equal_prompts_at_once_keep_their_pages(engines: Engines, model: TinyModel) -> None:
    """The prefix cache may replace a page by its twin: not while decode reads it."""
    engines.backend.held = True
    engines.send(engines.request(1, PROMPT, 3), engines.request(2, PROMPT, 3))
    engines.step_until(lambda: engines.prefill.stages() == ["INFLIGHT", "INFLIGHT"])
    assert engines.prefill.used_pages == 16
    engines.backend.held = False
    engines.backend.release()
    engines.step_to_rest()

    assert [engines.decode.finished[rid].tokens for rid in (1, 2)] == [model.greedy(PROMPT, 3)] * 2


@pytest.mark.parametrize("stage", ["SEARCH", "PREALLOC", "TRANSFER"])
def test_an_abort_on_decode_leaks_nothing(engines: Engines, model: TinyModel, stage: str) -> None:
    engines.backend.held = True
    request = engines.request(1, PROMPT, 4)
    if stage == "PREALLOC":
        engines.send(engines.request(9, list(range(100, 140)), 4))  # takes the memory
        engines.step_until(lambda: engines.decode.stages() == ["TRANSFER"])
        engines.decode.engine.apply(request)
    else:
        engines.send(request)
    if stage != "SEARCH":
        engines.step_until(lambda: engines.decode.stages()[-1:] == [stage])
    abort(engines.decode, 1)
    engines.decode.step()
    assert engines.decode.finished[1].finish_reason == "abort"
    if stage == "PREALLOC":
        engines.prefill.engine.apply(request)  # comes late, and is told
    engines.step_until(lambda: 1 in engines.prefill.finished)

    assert engines.prefill.finished[1].message is not None
    assert "the client has given it up" in engines.prefill.finished[1].message


@pytest.mark.parametrize("stage", ["BOOTSTRAP", "COMPUTE", "INFLIGHT"])
def test_an_abort_on_prefill_leaks_nothing(engines: Engines, model: TinyModel, stage: str) -> None:
    engines.backend.held = True
    request = engines.request(1, PROMPT, 4)
    engines.prefill.engine.apply(request)
    if stage != "BOOTSTRAP":
        engines.decode.engine.apply(request)
        engines.step_until(lambda: engines.prefill.stages() == [stage])
    abort(engines.prefill, 1)
    if stage == "BOOTSTRAP":
        engines.decode.engine.apply(request)
    engines.step_until(lambda: 1 in engines.decode.finished)

    assert engines.decode.finished[1].message is not None
    assert "the client has given it up" in engines.decode.finished[1].message


def test_no_page_is_given_away_while_a_read_may_still_write_to_it(engines: Engines, model: TinyModel) -> None:
    engines.backend.held = True
    engines.send(engines.request(1, PROMPT, 4))
    engines.step_until(lambda: engines.backend.reads)
    late = list(engines.backend.reads)
    abort(engines.decode, 1)
    engines.backend.held = False
    flood = [[index, *range(60, 83)] for index in range(6)]
    engines.send(*(engines.request(10 + index, prompt, 3) for index, prompt in enumerate(flood)))
    engines.step_until(lambda: all(10 + i in engines.decode.finished for i in range(6)) and engines.decode.stages() == ["REST"])
    engines.step_until(lambda: engines.decode.engine.scheduler.num_running == 1)
    assert engines.decode.stages() == ["REST"] and engines.decode.used_pages == 8, "the pages of the aborted request rest"
    for index, prompt in enumerate(flood):
        assert engines.decode.finished[10 + index].tokens == model.greedy(prompt, 3)
    for read in late:
        read.finish()
    engines.backend.release()
    engines.step_until(lambda: not engines.decode.stages())
    assert engines.decode.used_pages == 0


def test_no_page_is_fetched_into_while_a_forward_may_still_write_to_it(engines: Engines, model: TinyModel) -> None:
    engines.send(engines.request(1, PROMPT[:4], 50))
    engines.step_until(lambda: not engines.decode.stages() and not engines.prefill.stages())
    engines.send(engines.request(2, PROMPT, 4))
    time.sleep(0.05)
    while "TRANSFER" not in engines.decode.stages():
        engines.decode.step()
    time.sleep(0.05)
    engines.prefill.step()
    assert engines.decode.engine.scheduler.num_running == 2
    assert engines.prefill.stages() == ["BOOTSTRAP"], "a step was under way when the room got its pages"

    engines.step_to_rest()
    assert engines.decode.finished[2].tokens == model.greedy(PROMPT, 4)


def test_pages_of_a_failed_step_are_cleared_before_others_fetch_into_them(
    engines: Engines, model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.send(engines.request(1, PROMPT, 30))
    engines.step_until(lambda: not engines.decode.stages())
    engines.send(engines.request(2, PROMPT[::-1], 4))
    engines.step_until(lambda: engines.decode.stages() == ["PREALLOC"])
    runner = engines.decode.engine.runner
    forward = runner.forward

    def fail_once(*_: Any) -> Tensor:
        monkeypatch.setattr(runner, "forward", forward)
        raise OperationError(Operation("experts", print, 1), None, ValueError("boom"), fatal=False)

    monkeypatch.setattr(runner, "forward", fail_once)
    engines.step_to_rest()

    assert engines.decode.finished[1].finish_reason == "abort"
    assert engines.decode.finished[2].tokens == model.greedy(PROMPT[::-1], 4)


def test_a_request_that_never_fits_is_told_on_both_sides(engines: Engines) -> None:
    request = engines.request(1, list(range(20, 60)), 24)
    engines.prefill.engine.apply(request)
    too_long = engines.request(2, list(range(20, 60)), 30)
    engines.decode.engine.apply(too_long)
    assert engines.decode.engine.results.take()[0][0].message is not None
    engines.decode.engine.apply(request)
    engines.step_until(lambda: 1 in engines.decode.finished and engines.decode.finished[1].finish_reason is not None)
    assert engines.decode.finished[1].finish_reason == "length"


def test_decoding_that_runs_out_of_memory_goes_on_once_there_is_some(engines: Engines, model: TinyModel) -> None:
    """Sequences are sent back, computed again in small chunks, and lose nothing."""
    prompts = [[index, *range(60, 70)] for index in range(4)]
    engines.send(*(engines.request(index, prompt, 24) for index, prompt in enumerate(prompts)))
    engines.step_to_rest()

    assert engines.decode.engine.scheduler.num_retracted > 0
    for index, prompt in enumerate(prompts):
        assert engines.decode.finished[index].tokens == model.greedy(prompt, 24)
