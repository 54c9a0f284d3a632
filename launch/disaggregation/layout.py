"""Who fetches which pages from whom, for any two layouts. Pure.

MLA's latent KV is the same on every attention-TP rank, so any rank of the prefill DP group can serve any page. Every decode rank
needs all pages that it has not cached, each of them once. Glossary, with prefill attention TP 4 and decode attention TP 2:

    sources of decode rank 0:    prefill ranks 0 1         sources of decode rank 1:    prefill ranks 2 3
    its pages 0..7 from 0, 8..15 from 1, 16..23 from 0, ...   (STRIPE_PAGES = 8; a room begins the round with its own source)

With prefill attention TP 2 and decode attention TP 4, ranks 0 1 fetch from prefill rank 0, ranks 2 3 from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesaic.launch.disaggregation.protocol import RoomError

IntArray = npt.NDArray[np.int64]

STRIPE_PAGES = 8
"""Consecutive pages that come from one source: long enough for runs, short enough that a long prompt uses all sources."""


@dataclass(frozen=True, kw_only=True)
class PageRun:
    """Consecutive pages here and there: one message. `source` and `target` are the first pages' numbers in the two pools."""

    source: int
    target: int
    num_pages: int


def prefill_dp_rank(room: int, dp_size: int, explicit: int | None = None) -> int:
    """The DP rank that prefills a room: the one the request names, else room % dp_size (as SGLang). Raises RoomError."""
    if explicit is None:
        return room % dp_size
    if not 0 <= explicit < dp_size:
        raise RoomError(f"data_parallel_rank {explicit}: the prefill instance has DP ranks 0..{dp_size - 1}")
    return explicit


def source_ranks(decode_rank: int, decode_size: int, prefill_size: int) -> range:
    """Attention-TP ranks of the prefill group that one attention-TP rank of the decode group fetches from."""
    assert 0 <= decode_rank < decode_size and prefill_size >= 1
    if prefill_size >= decode_size:
        return range(decode_rank * prefill_size // decode_size, (decode_rank + 1) * prefill_size // decode_size)
    source = decode_rank * prefill_size // decode_size
    return range(source, source + 1)


def receiver_ranks(prefill_rank: int, prefill_size: int, decode_size: int) -> list[int]:
    """The inverse: attention-TP ranks of the decode group that fetch from this prefill rank."""
    return [rank for rank in range(decode_size) if prefill_rank in source_ranks(rank, decode_size, prefill_size)]


def pages_of_source(first_index: int, num_pages: int, source: int, num_sources: int, room: int) -> IntArray:
    """Which of the pages first_index .. first_index + num_pages come from the source-th source: their indices, ascending."""
    indices: IntArray = np.arange(first_index, first_index + num_pages, dtype=np.int64)
    mine: npt.NDArray[np.bool_] = (indices // STRIPE_PAGES + first_source(room, num_sources)) % num_sources == source
    return indices[mine]


def first_source(room: int, num_sources: int) -> int:
    """Where a room begins its round. A hash: the room's remainder is the DP rank already (Fibonacci hashing, Knuth)."""
    return (room * 0x9E3779B97F4A7C15 >> 32 & 0xFFFFFFFF) % num_sources


def page_runs(sources: Sequence[int] | IntArray, targets: Sequence[int] | IntArray) -> tuple[PageRun, ...]:
    """Pages source by source to target by target -> as few runs as possible, in the same order. Equal lengths, [n]."""
    source, target = np.asarray(sources, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    assert source.shape == target.shape
    if not len(source):
        return ()
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    starts = np.concatenate([[0], breaks])
    ends = np.append(breaks, len(source))
    return tuple(
        PageRun(source=int(source[start]), target=int(target[start]), num_pages=int(end - start))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    )
