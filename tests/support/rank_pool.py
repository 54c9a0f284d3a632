"""Four worker processes joined in one gloo group, started once per test session and reused by every distributed test.

A job is a picklable function called as `function(rank, *arguments)` on the first `world_size` workers; results come back in
rank order. A worker that fails or hangs breaks the pool: the error is raised and the next job starts a new one.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

WORLD_SIZE = 4
JOB_DEADLINE_S = 60
GROUPS = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3))
"""Created once by all workers: torch can't create groups among some processes again and again."""

WHOLE_GROUPS = ((0, 1), (2, 3), (0, 1, 2, 3))
PURPOSES = ("rows", "headers", "failures", "rebalance")
"""Further groups of WHOLE_GROUPS, for messages that must not meet those of a forward."""

EVERYTHING = "everything_staged"
"""The backend of `staged_group_of` where there is no GPU: the tensors of the CPU are staged, as a GPU's would be."""

_groups: dict[tuple[tuple[int, ...], str], Any] = {}


def group_of(ranks: tuple[int, ...], purpose: str = "forward") -> Any:
    """The group of these ranks for a purpose, inside a worker."""
    return _groups[ranks, purpose]


def staged_group_of(ranks: tuple[int, ...], purpose: str = "forward") -> Any:
    """As `group_of`, for ranks that share a GPU (launch/engine/staged_group.py)."""
    return _groups[ranks, f"staged {purpose}"]


class RankPool:
    """See the module's docstring. `close` ends the workers."""

    def __init__(self) -> None:
        self._workers: list[mp.process.BaseProcess] = []
        self._pipes: list[Any] = []

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any, deadline_s: float = JOB_DEADLINE_S) -> list[Any]:
        """Run a job; raises RuntimeError with the worker's traceback if it fails, TimeoutError if it hangs."""
        if not self._workers:
            self._start()
        for pipe in self._pipes[:world_size]:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes[:world_size]):
            if not pipe.poll(deadline_s):
                self.close()
                raise TimeoutError(f"rank {rank} did not finish {function.__name__} within {deadline_s:g} s")
            try:
                ok, value = pipe.recv()
            except EOFError:
                self.close()
                raise RuntimeError(f"rank {rank} died in {function.__name__}") from None
            if not ok:
                self.close()
                raise RuntimeError(f"rank {rank}: {value}")
            results.append(value)
        return results

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers, self._pipes = [], []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "4294967296")
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, str(rendezvous), theirs), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)


def _work(rank: int, rendezvous: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    from moesaic.launch.engine.staged_group import STAGED, register_staged

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    staged = STAGED if torch.cuda.is_available() else EVERYTHING
    register_staged(staged, everything=staged == EVERYTHING)
    wanted = [(ranks, "forward") for ranks in GROUPS] + [(ranks, purpose) for purpose in PURPOSES for ranks in WHOLE_GROUPS]
    for ranks, purpose in wanted:
        _groups[ranks, purpose] = dist.new_group(list(ranks))
        _groups[ranks, f"staged {purpose}"] = dist.new_group(list(ranks), backend=staged)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, function(rank, *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
