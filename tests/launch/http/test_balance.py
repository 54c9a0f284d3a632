"""The choice of DP ranks."""

from __future__ import annotations

import pytest

from moesaic.launch.engine.messages import LoadReport
from moesaic.launch.http.balance import Balancer


def report(dp_rank: int, *, running: int = 0, waiting: int = 0, used: int = 0, waiting_tokens: int = 0) -> LoadReport:
    return LoadReport(
        dp_rank=dp_rank,
        num_running_reqs=running,
        num_waiting_reqs=waiting,
        num_used_tokens=used,
        max_total_num_tokens=1000,
        num_waiting_tokens=waiting_tokens,
        gen_throughput=0.0,
        cache_hit_rate=0.0,
        num_retracted_reqs=0,
    )


def send(balancer: Balancer, rid: int, tokens: int) -> int:
    dp_rank = balancer.choose()
    balancer.sent(dp_rank, rid, tokens)
    return dp_rank


@pytest.mark.parametrize("method", ["auto", "total_tokens", "total_requests", "round_robin"])
def test_a_burst_spreads_evenly_before_any_report(method: str) -> None:
    balancer = Balancer(method, 4)
    chosen = [send(balancer, rid, 10) for rid in range(40)]
    assert [chosen.count(dp_rank) for dp_rank in range(4)] == [10] * 4


@pytest.mark.parametrize(("method", "expected"), [("total_tokens", [0, 1, 1, 1]), ("total_requests", [0, 1, 1, 0])])
def test_what_the_methods_look_at(method: str, expected: list[int]) -> None:
    balancer = Balancer(method, 2)
    assert [send(balancer, rid, tokens) for rid, tokens in enumerate((100, 10, 10, 10))] == expected


def test_a_report_replaces_what_it_has_seen_and_keeps_what_it_has_not() -> None:
    balancer = Balancer("total_tokens", 2)
    for rid in range(4):
        balancer.sent(0, rid, 10)
    # The rank has seen two of the four; with the cache hit they cost 5 tokens each.
    balancer.report(report(0, running=1, waiting=1, used=5, waiting_tokens=5))
    balancer.report(report(1, used=29))
    assert balancer.choose() == 1
    balancer.report(report(1, used=31))
    assert balancer.choose() == 0


def test_what_has_ended_no_longer_weighs() -> None:
    balancer = Balancer("total_tokens", 2)
    balancer.sent(0, 1, 500)
    assert balancer.choose() == 1
    balancer.done(0, 1)
    assert balancer.choose() == 0


def test_pinning() -> None:
    balancer = Balancer("auto", 2)
    assert balancer.choose(1) == 1
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="does not exist"):
            balancer.choose(wrong)


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'fastest'"):
        Balancer("fastest", 2)


def test_room_counts_free_places_and_the_queue() -> None:
    balancer = Balancer("auto", 2)
    assert balancer.room(max_running=2, max_queued=1) == 5
    for rid in range(3):
        balancer.sent(0, rid, 10)
    assert balancer.room(max_running=2, max_queued=1) == 2  # two free places on rank 1, the queue is full
    balancer.report(report(0, running=1, waiting=2))  # memory is short: a place is free but nobody gets it
    assert balancer.room(max_running=2, max_queued=1) == 1
    assert balancer.room(max_running=2, max_queued=0) == 0
