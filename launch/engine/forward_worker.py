"""Where forwards run: a thread of their own, so that the CPU's work for the next step is done meanwhile, or the caller's thread.

Jobs run one after the other in the order they were submitted, whatever the thread; torch and the kernels release Python's lock.
Knows no steps. A job that hangs is not given up on: collectives have their own deadlines, and the watchdog sees the rest.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import torch

ResultT = TypeVar("ResultT")


class Pending(Generic[ResultT]):
    """A job that was submitted."""

    __slots__ = ("_done", "_error", "_job", "_value")

    def __init__(self, job: Callable[[], ResultT]) -> None:
        self._job: Callable[[], ResultT] | None = job
        self._value: ResultT | None = None
        self._error: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        """For the worker: once."""
        assert self._job is not None, "a job runs once"
        try:
            self._value = self._job()
        except BaseException as error:
            self._error = error
        finally:
            self._job = None
            self._done.release()

    def result(self) -> ResultT:
        """What the job returned; waits for it. Raises what the job raised."""
        with self._done:
            if self._error is not None:
                raise self._error
            return self._value  # type: ignore[return-value]


class ForwardWorker(Protocol):
    """Runs jobs in order."""

    def submit(self, job: Callable[[], ResultT]) -> Pending[ResultT]: ...

    def close(self) -> None:
        """No job will be submitted any more; those that were still run."""
        ...


class InlineWorker:
    """Runs a job when it is submitted, in the caller's thread."""

    def submit(self, job: Callable[[], ResultT]) -> Pending[ResultT]:
        pending = Pending(job)
        pending.run()
        return pending

    def close(self) -> None:
        pass


class ThreadWorker:
    """Runs jobs in one thread, which ends when the worker is closed or dropped, and with the process in any case."""

    def __init__(self, device: torch.device) -> None:
        """`device`: where the jobs compute."""
        queue: SimpleQueue[Pending[object] | None] = SimpleQueue()
        self._queue = queue
        self._end = weakref.finalize(self, queue.put, None)
        threading.Thread(target=_run_jobs, args=(queue, device), name="forward", daemon=True).start()

    def submit(self, job: Callable[[], ResultT]) -> Pending[ResultT]:
        assert self._end.alive, "submitted to a closed worker"
        pending = Pending(job)
        self._queue.put(pending)  # type: ignore[arg-type]
        return pending

    def close(self) -> None:
        self._end()


def _run_jobs(queue: SimpleQueue[Pending[object] | None], device: torch.device) -> None:
    """Knows the queue alone, not the worker, so that the worker can be dropped."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    while (pending := queue.get()) is not None:
        pending.run()
        del pending  # while this thread waits, it must keep nothing alive
