"""Hands out KV-cache pages: integers in [0, num_pages), each owned by exactly one holder at a time.

A page is `page_size` token slots of KV memory in every layer. This file knows neither the memory nor who holds a page
(a live request or the prefix cache): it keeps the free ones, and refuses to take back a page that is not out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PageArray = NDArray[np.int32]


class OutOfPages(RuntimeError):  # noqa: N818 - reads as what happened, like StopIteration
    """More pages were asked for than can be had. The caller decides what gives way (wait, evict, retract)."""

    def __init__(self, num_wanted: int, num_available: int, num_pages: int) -> None:
        super().__init__(f"wanted {num_wanted} KV pages, but {num_available} of {num_pages} are available")
        self.num_wanted = num_wanted
        self.num_available = num_available
        self.num_pages = num_pages


class PageAllocator:
    """A stack of free pages, O(1) per page, vectorised per call.

    Deterministic: the same sequence of calls gives the same pages, so attention-TP ranks that replay one schedule agree
    on every page without talking. A fresh allocator gives 0, 1, 2, ...; the page freed last is given first (its memory
    is warm).
    """

    def __init__(self, num_pages: int) -> None:
        """Raises ValueError unless num_pages is at least 1."""
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._num_free = num_pages
        # The free pages are _stack[:_num_free]; the next one to go is the last of them.
        self._stack: PageArray = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._is_out: NDArray[np.bool_] = np.zeros(num_pages, dtype=np.bool_)
        self._position: PageArray = np.zeros(num_pages, dtype=np.int32)  # scratch of `free`, to find repeats in O(n)

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could give now."""
        return self._num_free

    def allocate(self, num_pages: int) -> PageArray:
        """Take `num_pages` pages out: int32 [num_pages], owned by the caller. Raises OutOfPages and then takes none."""
        assert num_pages >= 0, f"cannot allocate {num_pages} pages"
        if num_pages > self._num_free:
            raise OutOfPages(num_pages, self._num_free, self.num_pages)
        self._num_free -= num_pages
        pages = self._stack[self._num_free : self._num_free + num_pages][::-1].copy()
        self._is_out[pages] = True
        return pages

    def free(self, pages: PageArray) -> None:
        """Take back `pages` (int [n]). AssertionError, and nothing freed, for a page out of range, not out, or named
        twice.

        Raised rather than asserted, so that `python -O` keeps it: a page freed twice is one request reading another's
        text.
        """
        num = len(pages)
        if num == 0:
            return
        if pages.min() < 0 or pages.max() >= self.num_pages:
            outside = pages[(pages < 0) | (pages >= self.num_pages)]
            raise AssertionError(f"freed pages outside [0, {self.num_pages}): {outside}")
        if not self._is_out[pages].all():
            raise AssertionError(f"freed pages that are already free: {pages[~self._is_out[pages]]}")
        order = np.arange(num, dtype=np.int32)
        self._position[pages] = order
        if not (self._position[pages] == order).all():
            raise AssertionError(f"freed the same page twice in one call: {pages}")
        self._is_out[pages] = False
        self._stack[self._num_free : self._num_free + num] = pages[::-1]
        self._num_free += num

    def out_pages(self) -> PageArray:
        """All pages now out, ascending: int32 [num_pages - num_free]. For leak checks and tests; O(num_pages)."""
        return np.flatnonzero(self._is_out).astype(np.int32)
