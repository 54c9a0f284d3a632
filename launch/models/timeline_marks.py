"""Marks a model's communications on a timeline: each from submit to completion, and each wait for one."""

from __future__ import annotations

from collections.abc import Callable

from moesaic.moe.communication import Pending
from moesaic.overlap.timeline import Timeline


class TimelineMarks:
    """A `CommunicationWatcher` for the thread that runs the operations."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def posted(self, name: str, pending: Pending, num_bytes: int) -> Pending:
        """The same communication; num_bytes is not recorded."""
        pending.when_done(self._timeline.communication(name).end)
        return _Marked(self._timeline, name, pending)


class _Marked:
    """A communication whose waits are on the timeline."""

    def __init__(self, timeline: Timeline, name: str, pending: Pending) -> None:
        self._timeline = timeline
        self._name = name
        self._pending = pending

    def wait(self) -> None:
        with self._timeline.wait(self._name):
            self._pending.wait()

    def when_done(self, callback: Callable[[], None]) -> None:
        self._pending.when_done(callback)
