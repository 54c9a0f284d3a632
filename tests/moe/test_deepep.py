"""DeepEP's dispatchers, both generations and modes, on the stand-in over gloo: tokens get the direct sum over their experts."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from deepep_jobs import (
    CAP,
    HIDDEN,
    LOW_LATENCY,
    NORMAL,
    DeepEPCase,
    DeepEPLayout,
    DeepEPResult,
    direct_sum,
    dispatch_job,
    late_job,
    misuse_job,
    two_in_flight_job,
)
from rank_pool import RankPool

from moesaic.moe.deepep_config import ChunkSizes
from moesaic.moe.deepep_library import DeepEPError
from moesaic.moe.deepep_v1 import _settle_qp_depth
from moesaic.moe.dispatch_mode import DispatchMode

GENERATIONS = ["deepep", "deepep_v2"]
BF16_STEP = 2.0**-8


def _cases(world: int, mode: DispatchMode) -> list[DeepEPCase]:
    """The shapes that break dispatchers."""
    return [
        DeepEPCase(mode=mode, counts=(5, 1, 9, 2)[:world], seed=1),
        DeepEPCase(mode=mode, counts=(0, 6, 0, 3)[:world], topk=1, seed=2),
        DeepEPCase(mode=mode, counts=(0,) * world, seed=3),
        DeepEPCase(mode=mode, counts=(CAP,) * world, topk=8 // world, only_rank=world - 1, seed=4),
        DeepEPCase(mode=mode, counts=(7,) * world, topk=8, dtype=torch.float32, seed=5),
        DeepEPCase(mode=mode, counts=(4, 0, 7, 1)[:world], gaps=True, seed=6),
    ]


def _check(layout: DeepEPLayout, case: DeepEPCase, results: list[DeepEPResult]) -> None:
    """Rows are bf16 on their way there and back; FP8 leaves three bits there."""
    tolerance = 0.08 if layout.fp8 else 4 * BF16_STEP
    for rank, result in enumerate(results):
        expected = direct_sum(layout, case, rank)
        scale = expected.abs().mean().item() if len(expected) else 1.0
        error = (result.output.double() - expected).abs()
        assert not len(expected) or error.mean() < tolerance * scale, f"{layout} {case} rank {rank}: {error.mean() / scale}"
        assert not result.output.isnan().any()


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_dispatch_and_combine_give_the_direct_sum_in_modes_that_change(
    rank_pool: RankPool, generation: str, world: int, fp8: bool
) -> None:
    """One buffer, normal and low-latency steps in turn: the low-latency buffer is cleaned where it must be."""
    layout = DeepEPLayout(generation=generation, world=world, fp8=fp8, alignment=128)
    pairs = zip(_cases(world, NORMAL), _cases(world, LOW_LATENCY), strict=True)
    cases = [case for pair in pairs for case in (*pair, pair[1])]
    per_rank = rank_pool.run(world, dispatch_job, layout, cases)
    for number, case in enumerate(cases):
        results = [each[number] for each in per_rank]
        _check(layout, case, results)
        assert all(result.masked is (case.mode is LOW_LATENCY) for result in results)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_fp8_rows_reach_fp8_experts_as_they_travelled(rank_pool: RankPool, generation: str) -> None:
    """Values and scales, multiplied out, are bit for bit what other experts get."""
    cases = [case for mode in (LOW_LATENCY, NORMAL) for case in _cases(2, mode)[:2]]
    plain, kept = (
        rank_pool.run(2, dispatch_job, DeepEPLayout(generation=generation, world=2, fp8=True, fp8_rows=rows, alignment=16), cases)
        for rows in (False, True)
    )
    for one, other in zip(plain, kept, strict=True):
        assert all(torch.equal(a.output, b.output) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_low_latency_shapes_depend_on_the_cap_alone(rank_pool: RankPool, generation: str) -> None:
    layout = DeepEPLayout(generation=generation, world=4)
    cases = _cases(4, LOW_LATENCY)
    per_rank = rank_pool.run(4, dispatch_job, layout, cases)
    for results in per_rank:
        assert {result.rows_shape for result in results} == {(2, 4 * CAP, HIDDEN)}
    for number, case in enumerate(cases):
        if not case.gaps:
            assert sum(sum(results[number].counts) for results in per_rank) == sum(case.counts) * case.topk


@pytest.mark.parametrize("generation", GENERATIONS)
def test_normal_rows_are_those_of_this_ranks_experts_padded_to_the_alignment(rank_pool: RankPool, generation: str) -> None:
    case = DeepEPCase(mode=NORMAL, counts=(5, 3), topk=4, only_rank=1)
    tight, padded = (
        rank_pool.run(2, dispatch_job, DeepEPLayout(generation=generation, world=2, alignment=alignment), [case])
        for alignment in (1, 128)
    )
    assert [sum(each[0].counts) for each in tight] == [0, 8 * 4]
    assert [each[0].counts for each in padded] == [[0] * 4, [128] * 4]
    for narrow, wide in zip(tight, padded, strict=True):
        assert torch.equal(narrow[0].output, wide[0].output)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("mode", [NORMAL, LOW_LATENCY])
@pytest.mark.parametrize("order", ["deDcEfCF", "dDceECfF", "dDcCeEfF"])
def test_two_micro_batches_in_flight_are_the_same_as_one_after_the_other(
    rank_pool: RankPool, generation: str, mode: DispatchMode, order: str
) -> None:
    layout = DeepEPLayout(generation=generation, world=2)
    cases = (DeepEPCase(mode=mode, counts=(5, 2), seed=6), DeepEPCase(mode=mode, counts=(1, 8), seed=7))
    alone = rank_pool.run(2, dispatch_job, layout, list(cases))
    for rank, outputs in enumerate(rank_pool.run(2, two_in_flight_job, layout, cases, order)):
        assert all(torch.equal(output, alone[rank][i].output) for i, output in enumerate(outputs))


def test_the_tuning_of_the_flags_reaches_the_kernels(rank_pool: RankPool) -> None:
    """A queue that the buffer has no room for would be refused; the buffer is sized for the tuning."""
    chunks = ChunkSizes(num_sms=40, num_max_nvl_chunked_send_tokens=8, num_max_nvl_chunked_recv_tokens=512)
    layout = DeepEPLayout(generation="deepep", world=2, mode="normal", chunks=chunks)
    case = _cases(2, NORMAL)[0]
    _check(layout, case, [each[0] for each in rank_pool.run(2, dispatch_job, layout, [case])])


@pytest.mark.parametrize(
    ("generation", "mode", "names"),
    [
        ("deepep", LOW_LATENCY, "DeepEP failed to receive a dispatch: not heard from rank 2 within its deadline"),
        ("deepep", NORMAL, "DeepEP does not say whose; another rank did not take part in time"),
        ("deepep_v2", NORMAL, "DeepEP failed to dispatch: not heard from rank 2; another rank did not take part"),
        ("deepep_v2", LOW_LATENCY, "a kernel gave up waiting"),
    ],
)
def test_who_is_late_is_named_where_it_can_be_known(rank_pool: RankPool, generation: str, mode: DispatchMode, names: str) -> None:
    """And always the layer and the micro-batch."""
    layout = DeepEPLayout(generation=generation, world=4, mode=mode.value)
    messages = rank_pool.run(4, late_job, layout, DeepEPCase(mode=mode, counts=(1, 2, 3, 4)), 2, 0.15)
    assert messages[2] is None
    for message in itertools.compress(messages, (1, 1, 0, 1)):
        assert message is not None and names in message
        assert message.startswith("operation dispatch_b of layer 5 failed in micro-batch 1: ")


def test_the_stand_in_is_strict(rank_pool: RankPool) -> None:
    """It raises where the real library fails or corrupts, and delivers no sooner than the real one."""
    for found in rank_pool.run(2, misuse_job):
        assert found.pop("before its hook") == "True -2147483648"
        assert (found.pop("before its event"), found.pop("after its event"), found.pop("overwritten")) == ("True", "True", "True")
        assert int(found.pop("after its hook")) > 0
        wanted = {
            "combine too early": "before its dispatch was received",
            "third alive": "third call alive: it overwrites a dispatch that was not received",
            "hook twice": "called twice",
            "wrong dtype": "x.scalar_type() == torch.bfloat16",
            "both": "not(async and return_recv_hook)",
            "too many experts": "num_rc_per_pe 4 >= num_local_experts",
            "dirty": "clean_low_latency_buffer comes first",
            "stream": "previous_event.has_value() and async",
            "small": "LEGACY_NUM_BUFFER_ALIGNMENT_BYTES",
        }
        assert {what: wanted[what] for what in found if wanted[what] in found[what]} == wanted, found


@pytest.mark.parametrize(("given", "legal"), [("258", True), ("257", False), ("deep", False)])
def test_a_queue_depth_that_is_too_low_is_refused_with_the_one_that_is_wanted(
    given: str, legal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", given)
    if legal:
        _settle_qp_depth(1024, 258)
        return
    with pytest.raises(DeepEPError, match=f"NVSHMEM_QP_DEPTH={given}: .* need 258 or more; unset it, or set it to 1024"):
        _settle_qp_depth(1024, 258)


def test_more_tokens_deepen_the_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "")  # so that what is set below is taken back
    monkeypatch.delenv("NVSHMEM_QP_DEPTH")
    _settle_qp_depth(4096, 2050)
    assert os.environ["NVSHMEM_QP_DEPTH"] == "4096"
