"""All-to-all over gloo that completes later, with deadlines, and a file in which each rank notes how far it has come.

One per buffer. `abandoned`: calls that ran into their deadline; `drain` completes them once the late ranks have come, so that the
process group can be used again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class LateError(Exception):
    """`ranks` have not begun the call within its deadline."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(ranks)
        self.ranks = ranks


class Transfer:
    """Byte rows under way. `wait` gives what came from each rank."""

    def __init__(self, fabric: Fabric, work: dist.Work, received: Tensor, sizes: list[int], number: int, kept: Tensor) -> None:
        self._fabric, self._work, self._received = fabric, work, received
        self._sizes, self._number, self._kept = sizes, number, kept

    def wait(self, deadline_s: float, later: Callable[[list[Tensor]], None] | None = None) -> list[Tensor]:
        """Raises LateError; `later` is what else `drain` has to do then, with what has come."""
        since = time.monotonic()
        while not self._work.is_completed():
            if time.monotonic() - since > deadline_s:
                self._fabric.abandoned.append(lambda: self._finish(later))
                raise LateError(self._fabric.not_begun(self._number))
            time.sleep(20e-6)
        return self._parts()

    def _finish(self, later: Callable[[list[Tensor]], None] | None) -> None:
        parts = self._parts()
        if later is not None:
            later(parts)

    def _parts(self) -> list[Tensor]:
        self._work.wait()
        return list(self._received.split(self._sizes))


class Fabric:
    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.abandoned: list[Callable[[], None]] = []
        paths: list[str | None] = [None] * self.size
        dist.all_gather_object(paths, self._new_file() if self.rank == 0 else None, group)
        assert paths[0] is not None
        self._begun = np.memmap(paths[0], dtype=np.int64, mode="r+", shape=(self.size,))
        self._calls = 0
        self.barrier()
        if self.rank == 0:
            shutil.rmtree(Path(paths[0]).parent)  # all have mapped it

    def _new_file(self) -> str:
        path = Path(tempfile.mkdtemp(prefix="deep_ep_standin")) / "progress"
        path.write_bytes(bytes(8 * self.size))
        return str(path)

    def begin(self) -> None:
        """A call that every rank makes."""
        self._calls += 1
        self._begun[self.rank] = self._calls

    def not_begun(self, number: int) -> list[int]:
        return [rank for rank in range(self.size) if self._begun[rank] < number]

    def send(self, rows: Sequence[Tensor], arriving: list[int] | None = None) -> Transfer:
        """rows: uint8 [n, width] for each rank. arriving: rows from each (None: as many as are sent)."""
        leaving = [len(each) for each in rows]
        arriving = leaving if arriving is None else arriving
        packed = torch.cat(list(rows))
        received = packed.new_empty(sum(arriving), packed.shape[1])
        work = dist.all_to_all_single(received, packed, arriving, leaving, group=self.group, async_op=True)
        return Transfer(self, work, received, arriving, self._calls, packed)

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def drain(self) -> None:
        for finish in self.abandoned:
            finish()
        self.abandoned.clear()


def as_bytes(*columns: Tensor) -> Tensor:
    """Tensors [n, ...] -> uint8 [n, width]."""
    return torch.cat([each.contiguous().view(torch.uint8).flatten(1) for each in columns], dim=1)


def from_bytes(rows: Tensor, *columns: tuple[int, torch.dtype]) -> list[Tensor]:
    """Inverse of `as_bytes`: columns (width, dtype) -> tensors [n, width]."""
    sizes = [width * dtype.itemsize for width, dtype in columns]
    parts = zip(rows.split(sizes, dim=1), columns, strict=True)
    return [part.clone(memory_format=torch.contiguous_format).view(dtype) for part, (_, dtype) in parts]
