"""The reads of one room on one decode rank: which are under way, whether what came is right, and what it took.

Knows no states, no sources and no other rooms.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.protocol import FailureKind
from moesaic.launch.disaggregation.transfer import Read


@dataclass(frozen=True, kw_only=True)
class TransferStats:
    """What a room's transfer took on this rank: seconds from the first announced page to the last read one."""

    num_pages: int
    num_runs: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Fetch:
    """A read from `peer` into the pages `targets`, which are to have these checksums (empty: not checked)."""

    peer: str
    read: Read
    targets: Sequence[int]
    checksums: Sequence[int]


class RoomReads:
    """`memory`: where the pages go. All in the transfer thread, but for `stats`."""

    def __init__(self, memory: PagedMemory) -> None:
        self._memory = memory
        self._fetches: list[Fetch] = []
        self._num_runs = 0
        self._began = self._ended = time.monotonic()
        self.num_arrived = 0
        """Pages that are here and right."""

    def __len__(self) -> int:
        """Reads that are under way."""
        return len(self._fetches)

    @property
    def stats(self) -> TransferStats:
        return TransferStats(
            num_pages=self.num_arrived,
            num_runs=self._num_runs,
            num_bytes=self.num_arrived * self._memory.page_bytes,
            seconds=max(self._ended - self._began, 0.0),
        )

    def start_clock(self) -> None:
        """The first pages have been announced."""
        self._began = time.monotonic()

    def add(self, fetch: Fetch, num_runs: int) -> None:
        self._fetches.append(fetch)
        self._num_runs += num_runs

    def take_ended(self) -> list[Fetch]:
        """Those that have ended since it was last asked."""
        ended = [fetch for fetch in self._fetches if fetch.read.ended]
        if ended:
            self._fetches = [fetch for fetch in self._fetches if fetch not in ended]
        return ended

    def check(self, fetch: Fetch) -> tuple[FailureKind, str] | None:
        """Count the pages of an ended read as arrived; or what is wrong with them."""
        if fetch.read.error is not None:
            return "lost", f"{fetch.peer}: {fetch.read.error}"
        for page, expected in zip(fetch.targets, fetch.checksums, strict=bool(fetch.checksums)):
            found = self._memory.checksum(page)
            if found != expected:
                return "corrupt", f"page {page} arrived changed: checksum {found:08x}, prefill has {expected:08x}"
        self.num_arrived += len(fetch.targets)
        self._ended = time.monotonic()
        return None

    def cancel(self) -> None:
        """Nobody wants the pages any more."""
        for fetch in self._fetches:
            fetch.read.cancel()
