"""How long a dispatch or a combine takes on a cluster, from DeepEP's published tables: no figure here was measured by us.

Source of every number: DeepEP V1, docs/legacy.md of github.com/deepseek-ai/DeepEP at dd758caf, "Performance": H800 (NVLink at most
160 GB/s), one CX7 InfiniBand 400 Gb/s card per GPU, hidden 7168, top-8, FP8 dispatch and BF16 combine; normal mode with 4096 tokens
a rank and top-4 groups, low-latency mode with 128 tokens a rank. What lies between or beyond the tables:

    EP sizes between two rows   linear in log2(EP): time in low-latency mode, bandwidth in normal mode
    EP sizes beyond a table     the nearest row's (normal mode ends at 64, low-latency at 256)
    tokens, low-latency mode    up to 128: the time of 128 (which is too much); above: in proportion
    tokens, normal mode         bytes / bandwidth; bytes as DeepEP's own test counts them (tests/legacy/test_internode.py): a token
                                once for every node (within one node: for every rank) that holds any of its experts, own included
    skew                        times 1 / balancedness: so much more the busiest rank receives, and everybody waits for it

Knows no device and no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Direction = Literal["dispatch", "combine"]

RANKS_PER_NODE = 8
SOURCE = "DeepEP V1, docs/legacy.md at dd758caf (H800, CX7 400 Gb/s)"
TABLE_TOKENS = 128
LOW_LATENCY_US: dict[int, tuple[float, float]] = {
    8: (77, 114),
    16: (118, 195),
    32: (155, 273),
    64: (173, 314),
    128: (192, 369),
    256: (194, 360),
}
"""EP size -> microseconds of dispatch and combine, 128 tokens a rank."""
NVLINK_BYTES_PER_S: tuple[float, float] = (153e9, 158e9)
"""Dispatch and combine within a node, EP 8: bytes that a rank receives."""
RDMA_BYTES_PER_S: dict[int, tuple[float, float]] = {16: (43e9, 43e9), 32: (58e9, 57e9), 64: (51e9, 50e9)}
"""EP size -> dispatch and combine across nodes: bytes that a rank sends, own node included."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What every rank dispatches: `num_tokens` rows of `hidden` elements, `topk` experts each, in `topk_groups` expert groups.

    `balancedness`: mean / max of the rows that ranks receive.
    """

    ep_size: int
    num_tokens: int
    hidden: int
    topk: int
    topk_groups: int
    balancedness: float = 1.0


def low_latency_s(direction: Direction, exchange: Exchange) -> float:
    """Seconds in low-latency mode; 0 for one rank, which sends nothing."""
    if exchange.ep_size == 1:
        return 0.0
    place = _place(direction)
    table_us = between({size: pair[place] for size, pair in LOW_LATENCY_US.items()}, exchange.ep_size)
    return table_us * 1e-6 * max(1.0, exchange.num_tokens / TABLE_TOKENS) / exchange.balancedness


def normal_s(direction: Direction, exchange: Exchange) -> float:
    """Seconds in normal mode; 0 for one rank."""
    if exchange.ep_size == 1:
        return 0.0
    place = _place(direction)
    if exchange.ep_size <= RANKS_PER_NODE:
        copies, speed = distinct(exchange.ep_size, exchange.topk), NVLINK_BYTES_PER_S[place]
    else:
        nodes = min(math.ceil(exchange.ep_size / RANKS_PER_NODE), exchange.topk_groups)
        copies = distinct(nodes, exchange.topk)
        speed = between({size: pair[place] for size, pair in RDMA_BYTES_PER_S.items()}, exchange.ep_size)
    return exchange.num_tokens * copies * row_bytes(direction, exchange.hidden) / speed / exchange.balancedness


def row_bytes(direction: Direction, hidden: int) -> float:
    """A dispatched token is FP8 with a scale (4 bytes) per 128 elements, a combined one bf16."""
    return hidden * (1 + 4 / 128) if direction == "dispatch" else hidden * 2


def distinct(places: int, choices: int) -> float:
    """Expected number of distinct places among `choices` uniform independent ones."""
    return places * (1 - (1 - 1 / places) ** choices)


def between(table: dict[int, float], ep_size: int) -> float:
    """Linear in log2(EP) between the rows of a table, the nearest row beyond them."""
    sizes = sorted(table)
    if ep_size <= sizes[0]:
        return table[sizes[0]]
    for low, high in pairwise(sizes):
        if ep_size <= high:
            share = math.log2(ep_size / low) / math.log2(high / low)
            return table[low] + share * (table[high] - table[low])
    return table[sizes[-1]]


def _place(direction: Direction) -> int:
    return 0 if direction == "dispatch" else 1
