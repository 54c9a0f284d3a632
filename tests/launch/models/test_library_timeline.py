"""Messages of DeepEP (the stand-in) and of the shared-memory kernels are on the timeline as the collectives of torch are."""

from __future__ import annotations

from collections.abc import Callable

import interpreter
import pytest
from engine_jobs import EngineSettings
from forward_jobs import ForwardCase
from library_timeline_jobs import steps_job, symm_job
from rank_pool import RankPool
from tiny_models import TinyModel

from moesaic.overlap.timeline_figures import hidden_share
from moesaic.overlap.trace import Span, Trace

PREFILL, DECODE = ForwardCase(num_tokens=24, split=True), ForwardCase(num_tokens=8, decode=True, split=True)


def _one(trace: Trace, row: str, name: str, like: tuple[int | None, int | None]) -> Span:
    (span,) = (span for span in trace.spans if span.row == row and span.name == name and (span.layer, span.micro_batch) == like)
    return span


def _within(inner_ns: int, outer: Span) -> bool:
    return outer.start_ns <= inner_ns <= outer.end_ns


def _check(trace: Trace, layers: range, micro_batches: int, *, dispatched_in: str) -> None:
    """Of each layer and micro-batch one dispatch and one combine, from the operation that sends to the wait that ends it."""
    assert trace.num_unfinished == 0
    places = [(layer, number) for layer in layers for number in range(micro_batches)]
    assert sum(span.name in ("dispatch", "combine") for span in trace.row("communication")) == 2 * len(places)
    for place in places:
        for name, sender in (("dispatch", dispatched_in), ("combine", "combine_a")):
            message, wait = _one(trace, "communication", name, place), _one(trace, "wait", name, place)
            assert _within(message.start_ns, _one(trace, "cpu", sender, place)), (name, place)
            assert _within(message.end_ns, wait), (name, place)
            assert _within(wait.start_ns, _one(trace, "cpu", f"{name}_b", place)), (name, place)


def _hidden_by_the_other(trace: Trace) -> set[str]:
    """Messages under way while an operation of the other micro-batch computes from its start to its end."""
    return {
        message.name
        for message in trace.row("communication")
        for span in trace.row("computation")
        if span.micro_batch != message.micro_batch and message.start_ns < span.start_ns and span.end_ns < message.end_ns
    }


@pytest.mark.parametrize("generation", ["deepep", "deepep_v2"])
def test_deepeps_messages_last_from_what_sends_them_to_their_receipt(
    generation: str, tiny: Callable[..., TinyModel], rank_pool: RankPool
) -> None:
    model = tiny("plain", hidden_size=2048)
    settings = EngineSettings(
        model_path=str(model.folder), tp=2, dp=2, a2a=generation, chunk_tokens=24, max_running=8, cap=16, page_size=4
    )
    straight = ForwardCase(num_tokens=8, decode=True)
    for prefill, decode, alone in rank_pool.run(2, steps_job, settings, [PREFILL, DECODE, straight]):
        # In normal mode the rows leave when their counts are known, which the CPU waits for.
        _check(prefill, range(1, 3), 2, dispatched_in="dispatch_b")
        _check(decode, range(1, 3), 2, dispatched_in="dispatch_a")
        _check(alone, range(1, 3), 1, dispatched_in="dispatch_a")
        assert _hidden_by_the_other(decode) >= {"dispatch", "combine"}
        assert (hidden_share(decode) or 0.0) > 0.05


@pytest.mark.skipif(not interpreter.AVAILABLE, reason="there is a GPU: the interpreter is off")
def test_messages_through_shared_memory_last_until_the_receiving_kernel_has_them(rank_pool: RankPool) -> None:
    for trace in rank_pool.run(2, symm_job, 2, (3, 1)):
        _check(trace, range(3, 4), 1, dispatched_in="dispatch_a")
