"""Where a model's communications are posted, so that others can watch them: a timeline, or a network that is made slower.

Everything that talks to other ranks in a forward posts here: it gives the handle of what it has submitted and waits on the one that
it gets back. Knows no timeline; who watches implements `CommunicationWatcher`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor


class Waitable(Protocol):
    """A communication under way."""

    def wait(self) -> Any:
        """Until it is complete. Raises RuntimeError when it failed or its group's deadline has passed."""
        ...


class Pending(Waitable, Protocol):
    """A communication under way that tells when it is complete."""

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call it once the communication is complete, at once if it is, from any thread; never if the communication failed."""
        ...


class CommunicationWatcher(Protocol):
    """Sees each communication right after it was submitted."""

    def posted(self, name: str, pending: Pending, num_bytes: int) -> Pending:
        """Returns what is waited on instead: `pending` itself, or a handle around it.

        num_bytes: of this rank's own tensor, as it was handed to the collective.
        """
        ...


class Communications:
    """One per model. Without watchers a communication costs two checks.

    `transport` sees every collective by itself, from whichever thread submits it; its handles may complete later than the real
    ones. `marks` sees communications as the operations do, in the thread that runs these (two collectives that follow each other
    on their own are one), after `transport` has had its way with them.
    """

    def __init__(self) -> None:
        self.transport: CommunicationWatcher | None = None
        self.marks: CommunicationWatcher | None = None

    def post(self, name: str, work: dist.Work, sent: Tensor) -> Waitable:
        """A collective that an operation has submitted -> what to wait on."""
        if self.transport is None and self.marks is None:
            return work
        return self.mark(name, self.transfer(name, work, sent), sent)

    def transfer(self, name: str, work: dist.Work, sent: Tensor) -> Pending:
        """A collective that is part of a communication; from any thread."""
        pending = Collective(work)
        return pending if self.transport is None else self.transport.posted(name, pending, sent.nbytes)

    def mark(self, name: str, pending: Pending, sent: Tensor) -> Pending:
        """A communication as an operation sees it, from the operation's thread."""
        return pending if self.marks is None else self.marks.posted(name, pending, sent.nbytes)


class Collective:
    """A collective of torch.distributed as `Pending`. On the CPU `when_done` calls from the communication's own thread."""

    __slots__ = ("_work",)

    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self) -> None:
        self._work.wait()

    def when_done(self, callback: Callable[[], None]) -> None:
        def done(future: Any) -> None:
            if self._succeeded(future):
                callback()

        self._work.get_future().add_done_callback(done)

    @staticmethod
    def _succeeded(future: Any) -> bool:
        try:
            future.value()
        except RuntimeError:
            return False  # whoever waits hears of it
        return True
