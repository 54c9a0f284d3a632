"""Which decode steps replay a captured CUDA graph, and which graphs there are. Pure functions of sizes and step headers.

A graph is of fixed shapes, so a step is padded: all DP ranks to the same number of rows (from the headers, so all alike, and idle
ranks replay too), each rank to a width of its page table that holds its longest sequence (nobody else's business: attention
communicates nothing of that width). Whether a step splits in two micro-batches is part of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

FIRST_WIDTH_TOKENS = 4096
"""The narrowest page table, in tokens: what one program of the decode kernel reads (kernels/mla_decode.py, SPLIT_TOKENS)."""
WIDTH_FACTOR = 4
"""Of each page table's width to the next: programs without work are cheap, but not free."""


@dataclass(frozen=True, order=True, kw_only=True)
class GraphStep:
    """What all ranks know of a step that replays a graph: rows of every DP rank, and whether it runs as two micro-batches."""

    num_rows: int
    splits: bool


@dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """The graphs of a rank: one per number of rows, width of the page table and way to run (straight, split).

    rows: ascending. widths: pages, ascending; the last holds the longest sequence. split_from: rows from which a step may split, or
    None. One of these steps may run straight all the same, when some rank has less than that.
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    split_from: int | None

    def steps(self) -> Iterator[GraphStep]:
        """All steps that are captured, the largest first: later ones fit into the memory of earlier ones."""
        for num_rows, splits in product(reversed(self.rows), (False, True)):
            if not splits or (self.split_from is not None and num_rows >= max(self.split_from, 2)):
                yield GraphStep(num_rows=num_rows, splits=splits)

    def width(self, num_pages: int) -> int:
        """The narrowest page table that holds sequences of so many pages."""
        return next(width for width in self.widths if width >= num_pages)


def graph_rows(wanted: Sequence[int] | None, most: int) -> tuple[int, ...]:
    """Numbers of rows to capture: `wanted` (`--cuda-graph-bs`), else 1, 2, 4, every 8th to 256 and every 16th beyond, up to `most`.

    Raises ValueError for wanted ones that can't be.
    """
    if wanted is None:
        usual = (1, 2, 4, *range(8, 256, 8), *range(256, most, 16))
        return (*(rows for rows in usual if rows < most), most)
    bad = [rows for rows in wanted if not 1 <= rows <= most]
    if bad:
        raise ValueError(f"--cuda-graph-bs {bad[0]}: a DP rank decodes 1 to {most} requests in a step")
    return tuple(sorted(set(wanted)))


def table_widths(context_length: int, page_size: int) -> tuple[int, ...]:
    """Widths of page tables in pages, from FIRST_WIDTH_TOKENS by WIDTH_FACTOR up to the context length."""
    longest = -(-context_length // page_size)
    widths = []
    width = max(FIRST_WIDTH_TOKENS // page_size, 1)
    while width < longest:
        widths.append(width)
        width *= WIDTH_FACTOR
    return (*widths, longest)


def graph_step(num_tokens: Sequence[int], rows: Sequence[int], split_from: int | None) -> GraphStep | None:
    """Decode tokens of every DP rank -> the step to replay; None when it is larger than every graph, or idle.

    It splits where every rank that has tokens has at least `split_from`.
    """
    most = max(num_tokens)
    fitting = [each for each in rows if each >= most]
    if not fitting or not most:
        return None
    splits = split_from is not None and all(count >= max(split_from, 2) for count in num_tokens if count)
    return GraphStep(num_rows=fitting[0], splits=splits)
