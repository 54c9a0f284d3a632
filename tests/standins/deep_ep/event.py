"""Events: on a CPU the compute stream is the program, so that waiting for an event completes what it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class EventHandle:
    """`complete` fills the results of the operation; None: everything the program has done so far."""

    def __init__(self, complete: Callable[[], None] | None = None) -> None:
        self._complete = complete

    def current_stream_wait(self) -> None:
        if self._complete is not None:
            complete, self._complete = self._complete, None
            complete()


class EventOverlap:
    """As DeepEP's: a wrapper that a `with` statement can wait on."""

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Any, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self, release_handle: bool = False) -> None:
        assert self.event is not None
        self.event.current_stream_wait()
        if release_handle:
            self.event = None

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: object) -> None:
        if self.event is not None:
            self.current_stream_wait()
