"""A slower network than loopback, for measurements: adds a stated latency and a bandwidth limit to every communication.

The real collective runs over gloo, and with it whatever a late rank costs. From the moment it completes, its bytes pass a link of
`bytes_per_s`, one message after another, and it takes `latency_s` more. Nobody computes for it: a timer thread sleeps until then,
so the CPU is as free as while a network card works. It is a `CommunicationWatcher` for `ModelRunner.watch_communications`.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

_now = time.perf_counter


class Timer:
    """One thread that calls functions at their times."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="network timer", daemon=True).start()

    def at(self, moment: float, call: Callable[[], None]) -> None:
        """Call it at `moment` (`time.perf_counter`), in the timer's thread."""
        with self._changed:
            heapq.heappush(self._due, (moment, next(self._order), call))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > _now():
                    self._changed.wait(self._due[0][0] - _now() if self._due else None)
                _, _, call = heapq.heappop(self._due)
            call()


class EmulatedNetwork:
    """One rank's link. `latency_s` of a message after its last byte left; `bytes_per_s`: math.inf for no limit.

    So far: `seconds` that it has added, one message after another; `num_messages`; `num_bytes`.
    """

    def __init__(self, *, latency_s: float, bytes_per_s: float) -> None:
        self.seconds = 0.0
        self.num_messages = 0
        self.num_bytes = 0
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._timer = Timer()
        self._link = threading.Lock()
        self._free_at = 0.0

    def posted(self, name: str, pending: Any, num_bytes: int) -> Delayed:
        """See `CommunicationWatcher`."""
        delayed = Delayed(pending)
        pending.when_done(lambda: self._send(delayed, num_bytes))
        return delayed

    def _send(self, delayed: Delayed, num_bytes: int) -> None:
        """The real collective is complete: all ranks were there, the bytes enter the link."""
        transfer_s = num_bytes / self._bytes_per_s
        with self._link:
            left_at = max(_now(), self._free_at) + transfer_s
            self._free_at = left_at
            self.seconds += transfer_s + self._latency_s
            self.num_messages += 1
            self.num_bytes += num_bytes
        self._timer.at(left_at + self._latency_s, delayed.complete)


class Delayed:
    """A communication that is complete when the network says so."""

    def __init__(self, pending: Any) -> None:
        self._pending = pending
        self._complete = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def complete(self) -> None:
        with self._lock:
            self._complete.set()
            callbacks, self._callbacks = self._callbacks, []
        for call in callbacks:
            call()

    def wait(self) -> None:
        """Raises what the real collective raises."""
        self._pending.wait()
        self._complete.wait()

    def when_done(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if not self._complete.is_set():
                self._callbacks.append(callback)
                return
        callback()
