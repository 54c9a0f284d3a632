"""A backend for tests: copies within one process, when it is told to.

`FakeBackend` finds its peers in a table of this process. Reads are copied at once, or, while it is `held`, when it is released: so
a test decides when a transfer is slow and can look at what happens meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from moesaic.launch.disaggregation.layout import PageRun
from moesaic.launch.disaggregation.memory import PagedMemory

_numbers = count()
_memories: dict[bytes, PagedMemory] = {}


class FakeRead:
    """Runs that are copied when `finish` is called."""

    def __init__(self, copy: Callable[[], None]) -> None:
        self._copy = copy
        self.ended = False
        self.error: str | None = None

    @staticmethod
    def failed(error: str) -> FakeRead:
        """A read that has ended already."""
        read = FakeRead(lambda: None)
        read.finish(error)
        return read

    def cancel(self) -> None:
        """Like the real ones: what is under way can't be called back."""

    def finish(self, error: str | None = None) -> None:
        """Let the read end: with all pages copied, or with an error and no page touched."""
        if not self.ended:
            if error is None:
                self._copy()
            self.error, self.ended = error, True


class FakeBackend:
    """See transfer.Backend. `held`: reads wait in `reads` until `release` or `fail`."""

    name = "fake"
    needs_progress = False

    def __init__(self, memory: PagedMemory, *, held: bool = False) -> None:
        self._memory = memory
        self._peers: dict[str, bytes] = {}
        self._key = b"fake memory %d" % next(_numbers)
        self._changed: Callable[[], None] = lambda: None
        self.held = held
        self.reads: list[FakeRead] = []

    def start(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    def progress(self) -> None:
        """Not needed."""

    def describe(self) -> bytes:
        _memories[self._key] = self._memory
        return self._key

    def connect(self, peer: str, description: bytes) -> None:
        if description not in _memories:
            raise ValueError(f"{peer} is not in this process: the fake backend can't read its memory ({description!r})")
        self._peers[peer] = description

    def read(self, peer: str, runs: Sequence[PageRun]) -> FakeRead:
        source = _memories.get(self._peers[peer])
        if source is None:
            return FakeRead.failed(f"{peer} is gone")
        read = FakeRead(lambda: copy_runs(source, self._memory, runs))
        if self.held:
            self.reads.append(read)
        else:
            read.finish()
            self._changed()
        return read

    def release(self) -> None:
        """Let all waiting reads end well."""
        self._end(None)

    def fail(self, error: str) -> None:
        """Let all waiting reads end with an error."""
        self._end(error)

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def close(self) -> None:
        self._end("the backend was closed")
        _memories.pop(self._key, None)

    def _end(self, error: str | None) -> None:
        reads, self.reads = self.reads, []
        for read in reads:
            read.finish(error)
        self._changed()


def copy_runs(source: PagedMemory, target: PagedMemory, runs: Sequence[PageRun]) -> None:
    """Runs of pages from one memory of this process to another."""
    for run in runs:
        pieces = zip(source.views(run.source, run.num_pages), target.views(run.target, run.num_pages), strict=True)
        for from_view, to_view in pieces:
            to_view[:] = from_view
