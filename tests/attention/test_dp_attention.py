"""Attention-TP groups: shares cover every token once and come back whole, over real gloo."""

from __future__ import annotations

import pytest
import torch
from attention_jobs import reduce_job, round_trip_job, tokens
from hypothesis import given
from hypothesis import strategies as st
from rank_pool import RankPool

from moesaic.attention.dp_attention import AttentionTPGroup, share_bounds

COUNTS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 64]


@given(num_tokens=st.integers(0, 500), size=st.integers(1, 16))
def test_shares_follow_each_other_cover_all_tokens_and_fit_a_common_width(num_tokens: int, size: int) -> None:
    bounds = [share_bounds(num_tokens, rank, size) for rank in range(size)]
    assert [token for start, stop in bounds for token in range(start, stop)] == list(range(num_tokens))
    assert all(stop - start <= -(-num_tokens // size) for start, stop in bounds)


@pytest.mark.parametrize("size", [2, 4])
def test_scatter_then_gather_gives_every_rank_all_tokens_again(rank_pool: RankPool, size: int) -> None:
    results = rank_pool.run(size, round_trip_job, size, COUNTS)
    for i, count in enumerate(COUNTS):
        assert all(back for _, back in (result[i] for result in results)), f"{count} tokens"
        assert sum(result[i][0] for result in results) == count, "no token is dispatched twice"


@pytest.mark.parametrize("size", [2, 4])
def test_partial_sums_add_up_and_columns_join_in_rank_order(rank_pool: RankPool, size: int) -> None:
    assert all(all(right) for right in rank_pool.run(size, reduce_job, size, COUNTS))


def test_a_group_of_one_moves_nothing() -> None:
    group, rows = AttentionTPGroup(0, 1, None), tokens(5)
    assert group.scatter(rows) is rows
    assert group.gather(rows, 5) is rows
    assert group.all_reduce(rows) is rows
    assert torch.equal(group.gather_columns(rows), rows)


def test_several_ranks_without_a_process_group_are_refused() -> None:
    with pytest.raises(ValueError, match="of 4 ranks needs a process group"):
        AttentionTPGroup(0, 4, None)
