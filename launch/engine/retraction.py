"""What becomes of the KV of a sequence that has to step back: kept in host memory, or computed again when it returns.

The scheduler knows the interface; the ranks of a DP group give the same answers without talking, as host memory and costs are the
same on all of them. SGLang's decode copies every retracted request to host memory, however much that becomes; here it is
bounded, and done only where it is the cheaper way.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moesaic.attention.host_pool import HostKVPool
from moesaic.attention.page_allocator import PageArray
from moesaic.launch.engine.messages import RetractionLoad

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeptKV:
    """Host pages int32 [P] with the KV of a sequence's first `num_tokens` tokens."""

    host_pages: PageArray
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Restoration:
    """Host pages to be copied into pages of the device before the next forward, int32 [P] each."""

    host_pages: PageArray
    pages: PageArray

    @staticmethod
    def of_all(parts: list[Restoration]) -> Restoration | None:
        """One for all, None for none."""
        if not parts:
            return None
        return Restoration(np.concatenate([part.host_pages for part in parts]), np.concatenate([part.pages for part in parts]))


class KVKeeper(Protocol):
    """What the scheduler asks for."""

    def keep(self, pages: PageArray, num_tokens: int) -> KeptKV | None:
        """Copy the KV of a sequence's tokens in these pages; None: compute it again. No forward is under way."""
        ...

    def restore(self, kept: KeptKV, pages: PageArray, num_found: int) -> Restoration:
        """The sequence has its pages again, of which the first `num_found` need no copy. The copy is made in the next step, before
        its forward; until then nothing is kept.
        """
        ...

    def forget(self, kept: KeptKV) -> None:
        """Nobody wants the sequence any more."""
        ...


@dataclass(frozen=True, kw_only=True)
class RetractionCosts:
    """Seconds on the slowest rank. copy_s_per_page: to host memory and back; recompute_s_per_token: in steps that only do that."""

    copy_s_per_page: float
    recompute_s_per_token: float

    def favour_copy(self, num_pages: int, num_tokens: int) -> bool:
        """Whether `num_tokens` tokens in `num_pages` pages are copied there and back sooner than they are computed again."""
        return num_pages * self.copy_s_per_page < num_tokens * self.recompute_s_per_token


class HostKeeper:
    """Keeps KV in a pool of host memory, as long as there is room and where that is cheaper."""

    def __init__(self, pool: HostKVPool, costs: RetractionCosts, page_size: int) -> None:
        self._pool = pool
        self._costs = costs
        self._page_size = page_size
        self._was_full = False
        self._num_offloaded = self._offloaded_tokens = self._restored_tokens = 0
        self._num_host_full = self._num_cheaper = 0

    def keep(self, pages: PageArray, num_tokens: int) -> KeptKV | None:
        if not self._costs.favour_copy(len(pages), num_tokens):
            self._num_cheaper += 1
            return None
        if len(pages) > self._pool.num_free:
            self._num_host_full += 1
            self._tell_that_full()
            return None
        self._was_full = False
        self._num_offloaded += 1
        self._offloaded_tokens += num_tokens
        return KeptKV(self._pool.store(pages), num_tokens)

    def restore(self, kept: KeptKV, pages: PageArray, num_found: int) -> Restoration:
        # Free for the next `keep`, which comes only when the step that makes the copy has ended.
        self._pool.free(kept.host_pages)
        self._restored_tokens += max(0, kept.num_tokens - num_found * self._page_size)
        return Restoration(kept.host_pages[num_found:], pages[num_found : len(kept.host_pages)])

    def forget(self, kept: KeptKV) -> None:
        self._pool.free(kept.host_pages)

    @property
    def load(self) -> RetractionLoad:
        pool = self._pool
        return RetractionLoad(
            num_offloaded_reqs=self._num_offloaded,
            num_offloaded_tokens=self._offloaded_tokens,
            num_restored_tokens=self._restored_tokens,
            num_host_full_reqs=self._num_host_full,
            num_recompute_cheaper_reqs=self._num_cheaper,
            num_host_tokens=(pool.num_pages - pool.num_free) * self._page_size,
            max_host_tokens=pool.num_pages * self._page_size,
            copy_us=self._costs.copy_s_per_page / self._page_size * 1e6,
            recompute_us=self._costs.recompute_s_per_token * 1e6,
        )

    def _tell_that_full(self) -> None:
        """Once until there is room again."""
        if not self._was_full:
            logger.warning(
                "host memory for the KV of retracted requests is full (%d tokens): what is retracted now is computed again; "
                "--disaggregation-host-kv-gb allows more",
                self._pool.num_pages * self._page_size,
            )
        self._was_full = True
