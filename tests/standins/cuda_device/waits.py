"""Where the CPU waits for the device: every synchronisation with its kind, thread and source line.

Waiting completes the copies that were still under way. Inside a capture nothing may wait: the error is CUDA's.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = str(Path(__file__).parent)
NOT_OURS = ("/torch/", "/triton/", HERE, "/threading.py", "/contextlib.py", "<")


@dataclass(frozen=True)
class Wait:
    """`kind`: of operation that waited; `place`: "file:line function" of who asked for it; `thread`: its name."""

    kind: str
    place: str
    thread: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind} [{self.thread}]"


waits: list[Wait] = []
"""Since the stand-in was installed."""
is_capturing: Callable[[], bool] = lambda: False  # noqa: E731  graphs.py says
complete_copies: Callable[[int | None], None] = lambda until: None  # noqa: E731  copies.py says


def wait(kind: str, until: int | None = None) -> None:
    """The CPU waits for all work of the device, or for the copies before number `until`. Raises RuntimeError while capturing."""
    if is_capturing():
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind} at {_place()})")
    waits.append(Wait(kind, _place(), threading.current_thread().name))
    complete_copies(until)


def _place() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in NOT_OURS):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
