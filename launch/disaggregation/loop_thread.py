"""An asyncio event loop in a thread of its own, so that transfers go on while the engine computes.

Knows nothing of transfers. What runs in the loop needs no locks; other threads hand it callables.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_CLOSE_S = 5.0


class LoopThread:
    """Runs until `close`. An exception that nobody caught is a bug: `check` raises it in the owner's thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(self._note)
        self._error: BaseException | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, call: Callable[..., object], *args: object) -> None:
        """Have `call(*args)` run in the loop soon. Nothing happens after `close`."""
        if not self.loop.is_closed():
            try:
                self.loop.call_soon_threadsafe(call, *args)
            except RuntimeError:
                assert self.loop.is_closed()

    def wait(self, coroutine: Coroutine[Any, Any, T], seconds: float, operation: str) -> T:
        """Run in the loop and wait for the result. Raises TimeoutError that names the operation."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError as error:
            if future.done():
                raise
            future.cancel()
            raise TimeoutError(f"{self.name}: {operation} has not ended within {seconds:g} s") from error

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that lives until it ends or the loop is closed. In the loop's thread only."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def check(self) -> None:
        """Raises RuntimeError when something went wrong that no room stands for."""
        if self._error is not None:
            raise RuntimeError(f"{self.name} failed: {self._error!r}") from self._error

    def close(self) -> None:
        """Cancel all tasks and end the thread. May be called again."""
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_CLOSE_S)
        assert not self._thread.is_alive(), f"{self.name} has not ended within {_CLOSE_S} s: something in it blocks"

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            leftover = asyncio.all_tasks(self.loop)
            for task in leftover:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*leftover, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
        finally:
            self.loop.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._error = self._error or context.get("exception") or RuntimeError(context["message"])
