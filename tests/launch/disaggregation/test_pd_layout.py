"""Who fetches what from whom: for any two layouts every decode rank gets all it lacks, and nothing twice."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.launch.disaggregation.layout import (
    STRIPE_PAGES,
    first_source,
    page_runs,
    pages_of_source,
    prefill_dp_rank,
    receiver_ranks,
    source_ranks,
)
from moesaic.launch.disaggregation.protocol import RoomError

sizes = st.integers(1, 12)
rooms = st.integers(0, (1 << 63) - 1)


@given(sizes, sizes)
def test_every_prefill_rank_serves_and_receivers_are_the_inverse_of_sources(prefill_size: int, decode_size: int) -> None:
    pairs = {(source, rank) for rank in range(decode_size) for source in source_ranks(rank, decode_size, prefill_size)}
    inverse = {(source, rank) for source in range(prefill_size) for rank in receiver_ranks(source, prefill_size, decode_size)}

    assert pairs == inverse
    assert {source for source, _ in pairs} == set(range(prefill_size))
    assert {rank for _, rank in pairs} == set(range(decode_size))


@given(sizes, sizes)
def test_no_rank_has_more_partners_than_it_must(prefill_size: int, decode_size: int) -> None:
    sources = [len(source_ranks(rank, decode_size, prefill_size)) for rank in range(decode_size)]
    receivers = [len(receiver_ranks(rank, prefill_size, decode_size)) for rank in range(prefill_size)]

    assert max(sources) == -(-prefill_size // decode_size)
    assert max(receivers) == -(-decode_size // prefill_size)


@given(sizes, sizes, rooms, st.lists(st.integers(0, 40), max_size=6), st.integers(0, 60))
def test_each_lacking_page_is_fetched_once_however_the_prompt_is_chunked(
    prefill_size: int, decode_size: int, room: int, chunks: list[int], num_cached: int
) -> None:
    starts = np.cumsum([0, *chunks])
    for rank in range(decode_size):
        sources = source_ranks(rank, decode_size, prefill_size)
        fetched = [
            index
            for source in range(len(sources))
            for start, length in zip(starts[:-1].tolist(), chunks, strict=True)
            for index in pages_of_source(start, length, source, len(sources), room).tolist()
            if index >= num_cached
        ]

        assert sorted(fetched) == list(range(num_cached, sum(chunks)))


@given(st.integers(2, 8), rooms)
def test_a_long_prompt_is_spread_evenly_over_its_sources(num_sources: int, room: int) -> None:
    shares = [len(pages_of_source(0, num_sources * STRIPE_PAGES * 3, source, num_sources, room)) for source in range(num_sources)]

    assert shares == [STRIPE_PAGES * 3] * num_sources


def test_short_prompts_are_spread_over_the_sources_of_their_dp_rank() -> None:
    """Rooms of DP rank 1 of 2: both sources are used by prompts that are one stripe long."""
    used = [first_source(room, 2) for room in range(1, 2001, 2)]

    assert 400 < sum(used) < 600


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_runs_are_the_pairs_of_pages_and_as_few_as_possible(pairs: list[tuple[int, int]]) -> None:
    runs = page_runs([source for source, _ in pairs], [target for _, target in pairs])

    assert [(run.source + i, run.target + i) for run in runs for i in range(run.num_pages)] == pairs
    for before, after in pairwise(runs):
        assert (before.source + before.num_pages, before.target + before.num_pages) != (after.source, after.target)


def test_a_room_belongs_to_one_dp_rank_of_prefill() -> None:
    assert [prefill_dp_rank(room, 4) for room in (0, 1, 7, (1 << 63) - 1)] == [0, 1, 3, 3]
    assert prefill_dp_rank(7, 4, explicit=2) == 2
    with pytest.raises(RoomError, match=r"data_parallel_rank 4: the prefill instance has DP ranks 0\.\.3"):
        prefill_dp_rank(7, 4, explicit=4)
