"""What a transfer backend does, and the two ends of a room as the engine sees them. Interfaces only.

A backend moves bytes: it makes this rank's pages readable for others, and reads runs of their pages into its own. It knows no rooms
and no states; those are written once, in `sender.py` and `receiver.py`. The calls of one backend all come from one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy.typing as npt

from moesaic.launch.disaggregation.layout import PageRun
from moesaic.launch.disaggregation.protocol import TransferError, TransferState

PROGRESS_S = 0.0005
"""Between two calls of `Backend.progress`."""


class Read(Protocol):
    """Runs of pages on their way. Until `ended`, they may be written to."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will be written: all has arrived, or `error` says why not."""
        ...

    @property
    def error(self) -> str | None:
        """Why the pages have not arrived; None if they have, or while it is not known."""
        ...

    def cancel(self) -> None:
        """Nobody wants the pages any more. `ended` may come later, once nothing can write to them."""
        ...


class Backend(Protocol):
    """One rank's end. `peer` is any name that the caller gives another rank."""

    name: str

    needs_progress: bool
    """Whether the backend moves on only in calls of `progress`, and doesn't call `changed`."""

    def start(self, changed: Callable[[], None]) -> None:
        """Called once, first. `changed()` is to be called, from any thread, when a read has ended."""
        ...

    def progress(self) -> None:
        """Called often while rooms are open, on both sides, if the backend `needs_progress`. Doesn't wait."""
        ...

    def describe(self) -> bytes:
        """What others need to read this rank's memory; from now on they can."""
        ...

    def connect(self, peer: str, description: bytes) -> None:
        """Get ready to read from a peer. Doesn't wait. Raises ValueError for a description that is none."""
        ...

    def read(self, peer: str, runs: Sequence[PageRun]) -> Read:
        """Begin to read runs of the peer's pages into own ones. Doesn't wait or raise: failures are the read's."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forget a peer. Reads that are under way end with an error."""
        ...

    def close(self) -> None:
        """Stop serving and reading. Nothing is written afterwards."""
        ...


class Sender(Protocol):
    """The prefill end of a room. All calls are made by the engine's thread; none waits."""

    room: int

    @property
    def state(self) -> TransferState: ...

    @property
    def failure(self) -> TransferError | None:
        """Why the state is FAILED."""
        ...

    def send(self, pages: npt.ArrayLike) -> None:
        """The sequence's next pages are complete: their numbers in the pool. They must be kept until the state is final."""
        ...

    def finish(self, metadata: bytes) -> None:
        """All pages have been sent; `metadata` rides along."""
        ...

    def abort(self, reason: str) -> None:
        """Give the room up; its pages may be reused at once. Nothing happens to one that has ended."""
        ...


class Receiver(Protocol):
    """The decode end of a room. All calls are made by the engine's thread; none waits."""

    room: int

    @property
    def state(self) -> TransferState: ...

    @property
    def failure(self) -> TransferError | None:
        """Why the state is FAILED."""
        ...

    @property
    def quiet(self) -> bool:
        """Whether the room has ended and nothing will write to its pages any more: only then may they be reused after a failure."""
        ...

    @property
    def metadata(self) -> bytes:
        """What came with the last page; there once the state is SUCCESS."""
        ...

    def receive(self, pages: npt.ArrayLike, first_index: int = 0) -> None:
        """Where the sequence's pages are to go, from index `first_index` on (those before are here already). Called once."""
        ...

    def abort(self, reason: str) -> None:
        """Give the room up. Its pages may be reused once it is `quiet`."""
        ...
