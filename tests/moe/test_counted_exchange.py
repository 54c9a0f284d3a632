"""Rows whose numbers only their senders know: they leave when the counts are here, in one order, and failures reach who waits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exchange_jobs import ahead_job, failing_job, raced_job, reordered_job, waited_job
from rank_pool import RankPool

from moesaic.moe.communication import Communications
from moesaic.moe.counted_exchange import CountedExchange


@pytest.mark.parametrize("job", [ahead_job, reordered_job, waited_job], ids=["ahead", "reordered", "waited for"])
def test_rows_leave_when_their_counts_and_all_before_them_are_here(job: Callable[[int], None], rank_pool: RankPool) -> None:
    rank_pool.run(2, job)


def test_sending_ahead_and_waiting_at_once_send_everything_once(rank_pool: RankPool) -> None:
    rank_pool.run(2, raced_job, 200)


def test_failures_reach_those_who_wait_and_nobody_is_told_that_it_was_done(rank_pool: RankPool) -> None:
    lost = "Connection reset by peer"
    assert rank_pool.run(2, failing_job) == [[lost, lost, "the rows could not be sent: no buffer space"]] * 2


def test_alone_the_rows_are_here_at_once() -> None:
    exchange = CountedExchange(size=1, counts_group=None, rows_group=None, communications=Communications())
    rows, told = torch.arange(12, dtype=torch.uint8).view(3, 4), []
    started = exchange.start(rows, torch.tensor([[3]]), ahead=True, most_rows=3)
    started.when_done(lambda: told.append("done"))
    started.wait()
    assert torch.equal(started.received, rows) and started.counts == [[3]] and told == ["done"]


def test_several_ranks_need_a_group_for_counts_and_one_for_rows() -> None:
    with pytest.raises(ValueError, match="an exchange among 2 ranks needs a process group for counts and one for rows"):
        CountedExchange(size=2, counts_group=None, rows_group=None, communications=Communications())
