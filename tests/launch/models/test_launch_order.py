"""What two micro-batches submit, and when: compute before the wait that blocks the CPU, from traces of real steps on two ranks.

The same operations in an order that waits too early leave the computation row idle: the timeline's own figures show it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_jobs import EngineSettings
from forward_jobs import ForwardCase, Forwards
from launch_order_jobs import Recorded, launch_order_job
from rank_pool import RankPool
from tiny_models import TinyModel

from moesaic.overlap.timeline import Timeline
from moesaic.overlap.timeline_figures import Launch, hidden_share, idle_share, submitted_before
from moesaic.overlap.trace import Trace, merge

Tiny = Callable[..., TinyModel]
SIZES = {"hidden_size": 256, "moe_intermediate_size": 96, "num_hidden_layers": 4, "intermediate_size": 256}
SPARSE = range(1, 4)
STEPS = 4


def _settings(tiny: Tiny, backend: str) -> EngineSettings:
    return EngineSettings(model_path=str(tiny("plain", **SIZES).folder), tp=2, dp=2, ep=2, a2a=backend, cap=512)


def _before(trace: Trace, earlier: tuple[str, int], later: tuple[str, int]) -> bool:
    return submitted_before(trace, Launch(*earlier), Launch(*later))


def _check_prefill_order(trace: Trace) -> None:
    """Of both micro-batches: no wait before the other one's computation, that can run under it, has been submitted."""
    for layer in SPARSE:
        assert _before(trace, (f"dispatch_a of layer {layer}", 1), (f"dispatch_b of layer {layer}", 0))
        assert _before(trace, (f"attention_core of layer {layer}", 1), (f"dispatch_b of layer {layer}", 0))
        assert _before(trace, (f"experts of layer {layer}", 0), (f"dispatch_b of layer {layer}", 1))
        assert _before(trace, (f"experts of layer {layer}", 1), (f"combine_b of layer {layer}", 0))
        assert _before(trace, (f"shared_expert of layer {layer}", 0), (f"combine_b of layer {layer}", 0))
    for layer in SPARSE[1:]:
        assert _before(trace, (f"attention_core of layer {layer}", 0), (f"combine_b of layer {layer - 1}", 1))


def test_the_right_order_hides_what_waiting_too_early_leaves_open(tiny: Tiny, rank_pool: RankPool) -> None:
    case = ForwardCase(num_tokens=384, split=True)
    ranks: list[Recorded] = rank_pool.run(2, launch_order_job, _settings(tiny, "torch"), case, STEPS)
    right, early = merge(rank.right for rank in ranks), merge(rank.waits_first for rank in ranks)

    _check_prefill_order(right)
    for layer in SPARSE:
        assert _before(early, (f"dispatch_b of layer {layer}", 0), (f"attention_core of layer {layer}", 1))
    kinds = [{(span.name, span.layer, span.micro_batch) for span in trace.row("cpu")} for trace in (right, early)]
    assert kinds[0] == kinds[1], "the same operations"
    shown = [(hidden_share(trace) or 0.0, idle_share(trace) or 0.0) for trace in (right, early)]
    (hidden, idle), (hidden_early, idle_early) = shown
    assert hidden > hidden_early + 0.25, shown
    assert idle < idle_early - 0.1, shown


def trace_job(rank: int, settings: EngineSettings, case: ForwardCase) -> Trace:
    """Job for a RankPool: one step, recorded."""
    forwards = Forwards(settings, rank)
    timeline = Timeline(rank=rank)
    forwards.runner.timeline = timeline
    with timeline.step(0):
        forwards.run(case)
    forwards.runner.timeline = None
    return timeline.trace()


def test_backend_none_prefills_in_the_same_order(tiny: Tiny, rank_pool: RankPool) -> None:
    _check_prefill_order(merge(rank_pool.run(2, trace_job, _settings(tiny, "none"), ForwardCase(split=True))))


@pytest.mark.parametrize("backend", ["none", "torch"])
def test_in_decode_a_dispatch_is_waited_for_after_the_other_halfs_experts_or_attention(
    backend: str, tiny: Tiny, rank_pool: RankPool
) -> None:
    """Two stages apart; the shared expert of the same half lies under its dispatch."""
    trace = merge(rank_pool.run(2, trace_job, _settings(tiny, backend), ForwardCase(decode=True, split=True)))
    for layer in SPARSE:
        for half in (0, 1):
            assert _before(trace, (f"dispatch_a of layer {layer}", half), (f"shared_expert of layer {layer}", half))
            assert _before(trace, (f"shared_expert of layer {layer}", half), (f"dispatch_b of layer {layer}", half))
        assert _before(trace, (f"attention_prepare of layer {layer}", 1), (f"combine_b of layer {layer}", 0))
    for layer in SPARSE[1:]:
        assert _before(trace, (f"experts of layer {layer - 1}", 1), (f"dispatch_b of layer {layer}", 0))
        assert _before(trace, (f"attention_core of layer {layer}", 0), (f"dispatch_b of layer {layer - 1}", 1))


def test_a_straight_step_is_one_micro_batch_in_the_lists_order(tiny: Tiny, rank_pool: RankPool) -> None:
    trace = merge(rank_pool.run(2, trace_job, _settings(tiny, "torch"), ForwardCase()))
    assert {span.micro_batch for span in trace.row("cpu")} == {0}
    for layer in SPARSE:
        assert _before(trace, (f"dispatch_b of layer {layer}", 0), (f"shared_expert of layer {layer}", 0))
