"""Slots and pages of one DP rank's running sequences: taken at admission and as they grow, shared with the prefix cache, given up.

Pages are allocated for all tokens that a sequence has when it is admitted, later ones one by one. Admission leaves room for the
growth of those that run (`growth.py`). A page that is freed while a launched forward still uses it may be given away at once:
forwards run in the order of their launch. Knows no queues, and not who decodes: slots are the caller's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from moesaic.attention.page_allocator import PageAllocator, PageArray
from moesaic.attention.prefix_cache import PrefixCache
from moesaic.launch.engine.growth import Growth
from moesaic.launch.engine.sequence import Int64Array, Sequence, SequenceTable

if TYPE_CHECKING:
    from moesaic.launch.engine.scheduler import SchedulerConfig


class RunningMemory:
    """Of the sizes in `config`."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.cache = PrefixCache(PageAllocator(config.num_pages), config.page_size, config.prefix_cache)
        self.table = SequenceTable(config.max_running, -(-config.context_length // config.page_size), config.context_length)
        self.growth = Growth(config.growth_tokens)
        self._page_size = config.page_size

    def allocate(self, sequence: Sequence, matchable_tokens: int, growing: Int64Array) -> bool:
        """Give a sequence a slot and the pages of all its tokens, unless those in the slots `growing` need the room.

        Of its first `matchable_tokens`, what the prefix cache has is taken from there.
        """
        match = self.cache.match(sequence.tokens[: sequence.num_tokens], matchable_tokens)
        num_new = -(-sequence.num_tokens // self._page_size) - len(match.pages)
        if num_new + self._reserved_pages(growing) > self.cache.available_pages():
            self.cache.release(match.node)
            return False
        self.table.add(sequence, np.concatenate([match.pages, self.cache.allocate(num_new)]), match.num_tokens)
        sequence.node = match.node
        sequence.num_computed = sequence.num_settled = match.num_tokens
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = match.num_tokens
            sequence.admitted_at = time.monotonic()
        return True

    def _reserved_pages(self, slots: Int64Array) -> int:
        """Pages that the sequences in these slots are expected to need."""
        if not len(slots):
            return 0
        table = self.table
        num_tokens = table.num_tokens[slots]
        growth = self.growth.expected_tokens(
            remaining=table.max_tokens[slots] - num_tokens,
            produced=num_tokens - table.num_prompt[slots],
            held=num_tokens - table.num_found[slots],
        )
        return growth // self._page_size

    def starting_a_page(self, slots: Int64Array) -> Int64Array:
        """Those of the slots whose next forward writes the first token of a page that they don't have yet."""
        return slots[(self.table.num_tokens[slots] - 1) // self._page_size >= self.table.num_pages[slots]]

    def add_page(self, slots: Int64Array) -> None:
        """One page more for each of these slots; so many are available."""
        if len(slots):
            self.table.pages[slots, self.table.num_pages[slots]] = self.cache.allocate(len(slots))
            self.table.num_pages[slots] += 1

    def settled_pages(self, sequence: Sequence) -> PageArray:
        """The pages int32 [P] with a running sequence's settled tokens, a view."""
        return self.table.page_row(sequence.slot)[: -(-sequence.num_settled // self._page_size)]

    def share(self, sequence: Sequence) -> None:
        """Give the full settled pages to the prefix cache, if it may have them; duplicates are replaced by the cached ones.

        A launched forward may still read the duplicates, but writes to no full page: they may be given away (see above).
        """
        self.table.sequence(sequence.slot)
        if not sequence.shares:
            return
        assert sequence.node is not None
        row = self.table.page_row(sequence.slot)
        insertion = self.cache.insert(sequence.tokens[: sequence.num_settled], row, sequence.node)
        sequence.node = insertion.node
        if insertion.num_replaced:
            row[:] = insertion.pages

    def release(self, sequence: Sequence) -> PageArray:
        """Take a running sequence's slot and pages; what it shares with the cache stays there. Returns the freed pages."""
        row = self.table.remove(sequence)
        assert sequence.node is not None
        freed = row[sequence.node.depth if self.cache.enabled else 0 :]
        self.cache.allocator.free(freed)
        self.cache.release(sequence.node)
        sequence.node = None
        return freed
