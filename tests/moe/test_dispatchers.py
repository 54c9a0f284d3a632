"""Every dispatcher, mode and expert-parallel size gives the direct sum over each token's experts, over real gloo."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dispatch_jobs import HIDDEN, DispatchCase, DispatchResult, direct_sum, dispatch_job
from rank_pool import RankPool

from moesaic.moe.all_to_all import AllToAllDispatcher
from moesaic.moe.communication import Communications
from moesaic.moe.config import ExpertPlacement
from moesaic.moe.counted_exchange import CountedExchange
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.token_bytes import empty_token, pack_tokens, unpack_tokens

MODES = list(DispatchMode)


def _variations(base: DispatchCase) -> list[DispatchCase]:
    """The shapes that break dispatchers, for one layout."""
    sources = len(base.counts)
    uneven = tuple((5, 1, 9, 2)[:sources])
    with_idle = tuple((0, 6, 0, 3)[:sources])
    return [
        replace(base, counts=uneven, alignment=128, seed=1),
        replace(base, counts=with_idle, seed=2),
        replace(base, counts=(0,) * sources, seed=3),
        replace(base, counts=(4,) * sources, topk=base.num_experts // base.ep, only_expert_rank=base.ep - 1, seed=4),
        replace(base, counts=uneven, topk=base.num_experts, seed=5),
        replace(base, counts=uneven, topk=1, alignment=128, seed=6),
        replace(base, counts=(1,) + (0,) * (sources - 1), topk=7, seed=7),
        replace(base, counts=(33,) * sources, topk=5, seed=8),
    ]


def _run(pool: RankPool, cases: list[DispatchCase]) -> list[list[DispatchResult]]:
    """Results per case and rank."""
    world = cases[0].world
    per_rank = [dispatch_job(0, cases)] if world == 1 else pool.run(world, dispatch_job, cases)
    return [[results[i] for results in per_rank] for i in range(len(cases))]


def _check(case: DispatchCase, results: list[DispatchResult]) -> None:
    expected = [direct_sum(case, source) for source in range(len(case.counts))]
    for rank, result in enumerate(results):
        own = expected[rank * len(case.counts) // case.world]
        torch.testing.assert_close(
            result.output.double(), own, rtol=1e-5, atol=1e-5, msg=lambda text, rank=rank: f"{case}, rank {rank}: {text}"
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_all_to_all_gives_the_direct_sum(rank_pool: RankPool, mode: DispatchMode, ep: int) -> None:
    cases = _variations(DispatchCase(backend="torch", mode=mode, world=ep, ep=ep, counts=(1,) * ep))
    for case, results in zip(cases, _run(rank_pool, cases), strict=True):
        _check(case, results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("world", "dp", "ep"),
    [(1, 1, 1), (2, 1, 2), (2, 2, 2), (2, 2, 1), (4, 4, 4), (4, 2, 4), (4, 2, 2), (4, 1, 4)],
)
def test_all_gather_gives_the_direct_sum_whatever_dp_and_the_split_of_experts(
    rank_pool: RankPool, mode: DispatchMode, world: int, dp: int, ep: int
) -> None:
    cases = _variations(DispatchCase(backend="none", mode=mode, world=world, ep=ep, counts=(1,) * dp))
    for case, results in zip(cases, _run(rank_pool, cases), strict=True):
        _check(case, results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("backend", "world", "dp"), [("torch", 2, 2), ("torch", 4, 4), ("none", 2, 2), ("none", 2, 1)])
def test_outputs_in_two_halves_are_bit_for_bit_those_of_the_whole(
    rank_pool: RankPool, backend: str, world: int, dp: int, mode: DispatchMode
) -> None:
    """Except where the reduction of many ranks orders its sums by the row's place (backend none, checked below)."""
    wholes = _variations(DispatchCase(backend=backend, mode=mode, world=world, ep=world, counts=(1,) * dp))
    halves = [replace(case, halves=True) for case in wholes]
    for case, whole, halved in zip(halves, _run(rank_pool, wholes), _run(rank_pool, halves), strict=True):
        _check(case, halved)
        assert all(torch.equal(one.output, other.output) for one, other in zip(whole, halved, strict=True)), case


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "dp", "ep"), [(1, 1, 1), (4, 2, 2), (4, 4, 4)])
def test_all_gather_gives_the_direct_sum_in_two_halves(
    rank_pool: RankPool, world: int, dp: int, ep: int, mode: DispatchMode
) -> None:
    cases = _variations(DispatchCase(backend="none", mode=mode, world=world, ep=ep, counts=(1,) * dp, halves=True))
    for case, results in zip(cases, _run(rank_pool, cases), strict=True):
        _check(case, results)


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_rows_that_leave_without_the_caller_arrive_alike(rank_pool: RankPool, ep: int) -> None:
    base = DispatchCase(backend="torch", mode=DispatchMode.NORMAL, world=ep, ep=ep, counts=(1,) * ep, overlaps=True)
    cases = _variations(base)
    for case, results in zip(cases, _run(rank_pool, cases), strict=True):
        _check(case, results)


@pytest.mark.parametrize("backend", ["torch", "none"])
def test_alignment_pads_rows_and_changes_no_result(rank_pool: RankPool, backend: str) -> None:
    base = DispatchCase(backend=backend, mode=DispatchMode.NORMAL, world=2, ep=2, counts=(7, 4))
    tight, padded = _run(rank_pool, [base, replace(base, alignment=128)])
    for narrow, wide in zip(tight, padded, strict=True):
        assert wide.counts == [-(-count // 128) * 128 for count in narrow.counts]
        torch.testing.assert_close(narrow.output, wide.output, rtol=1e-6, atol=1e-6)


def test_low_latency_shapes_depend_on_the_header_alone(rank_pool: RankPool) -> None:
    """[local experts, T_max * R, H], whoever sends what to whom; counts say what is valid."""
    base = DispatchCase(backend="torch", mode=DispatchMode.LOW_LATENCY, world=4, ep=4, counts=(5, 1, 0, 2), topk=2)
    cases = [base, replace(base, seed=1), replace(base, only_expert_rank=3), replace(base, topk=8)]
    for case, results in zip(cases, _run(rank_pool, cases), strict=True):
        assert all(result.masked for result in results)
        assert {result.rows_shape for result in results} == {(2, 5 * 4, HIDDEN)}
        assert sum(sum(result.counts) for result in results) == sum(case.counts) * case.topk


def test_normal_mode_receives_exactly_the_rows_of_its_experts(rank_pool: RankPool) -> None:
    base = DispatchCase(backend="torch", mode=DispatchMode.NORMAL, world=4, ep=4, counts=(5, 1, 0, 2), topk=2)
    spread, one_rank = _run(rank_pool, [base, replace(base, only_expert_rank=3)])
    for results in (spread, one_rank):
        assert not any(result.masked for result in results)
        assert [result.rows_shape for result in results] == [(sum(result.counts), HIDDEN) for result in results]
        assert sum(sum(result.counts) for result in results) == 8 * 2
    assert [sum(result.counts) for result in one_rank] == [0, 0, 0, 16]


def test_expert_parallelism_without_a_group_is_refused() -> None:
    alone = CountedExchange(size=1, counts_group=None, rows_group=None, communications=Communications())
    with pytest.raises(ValueError, match="over 2 ranks needs a process group"):
        AllToAllDispatcher(
            placement=ExpertPlacement(num_slots=4, ep_size=2, ep_rank=0),
            group=None,
            exchange=alone,
            communications=Communications(),
            alignment=1,
        )


def test_experts_are_split_in_equal_runs_or_refused() -> None:
    places = [ExpertPlacement(num_slots=12, ep_size=3, ep_rank=rank) for rank in range(3)]
    assert [(place.first, place.num_local) for place in places] == [(0, 4), (4, 4), (8, 4)]
    with pytest.raises(ValueError, match="10 expert slots can't be split evenly over ep_size 3"):
        ExpertPlacement(num_slots=10, ep_size=3, ep_rank=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 4])
def test_a_token_survives_its_trip_as_bytes(dtype: torch.dtype, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 6, generator=generator).to(dtype)
    ids = torch.randint(-1, 400, (num_tokens, 3), generator=generator)
    weights = torch.rand(num_tokens, 3, generator=generator)
    back = unpack_tokens(pack_tokens(hidden, ids, weights), dtype, 3)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(back, (hidden, ids, weights), strict=True))


def test_the_empty_token_has_no_experts() -> None:
    hidden, ids, weights = unpack_tokens(empty_token(6, 3, torch.bfloat16, torch.device("cpu")), torch.bfloat16, 3)
    assert ids.tolist() == [[-1, -1, -1]]
    assert not hidden.any()
    assert not weights.any()
