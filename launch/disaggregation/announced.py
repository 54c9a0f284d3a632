"""What one prefill rank has said of a room's pages, and whether that makes sense. Knows no reads and no states."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.launch.disaggregation.directory import Source
from moesaic.launch.disaggregation.layout import IntArray, pages_of_source
from moesaic.launch.disaggregation.protocol import Last, Pages


@dataclass(eq=False)
class Announced:
    """`index`: of the source among the room's `num_sources`. `num_pages`: announced so far, from the sequence's first on.
    `closed`: it has nothing more to say of the room.
    """

    source: Source
    index: int
    num_sources: int
    num_pages: int = 0
    last: Last | None = None
    closed: bool = False

    @property
    def peer(self) -> str:
        return self.source.link.peer

    def add(self, pages: Pages, room_for: int) -> str | None:
        """More pages; `room_for`: how many there may be in all. Or what is wrong with them."""
        if pages.first_index != self.num_pages or self.last is not None:
            return f"{self.peer} announced page {pages.first_index} of the sequence, expected page {self.num_pages}"
        end = pages.first_index + len(pages.numbers)
        if end > room_for:
            return f"{self.peer} announced {end} pages, there is room for {room_for}"
        self.num_pages = end
        return None

    def to_read(self, pages: Pages, first_index: int) -> IntArray:
        """Those of the pages that this source is to serve and that lie at `first_index` or after: their indices in the sequence."""
        indices = pages_of_source(pages.first_index, len(pages.numbers), self.index, self.num_sources, pages.room)
        return indices[indices >= first_index]

    def miscount(self, expected: int) -> str | None:
        """What is wrong with the number of pages, now that the last has been announced."""
        assert self.last is not None
        if self.num_pages == self.last.num_pages == expected:
            return None
        return f"{self.peer} announced {self.num_pages} of {self.last.num_pages} pages, {expected} were expected"
