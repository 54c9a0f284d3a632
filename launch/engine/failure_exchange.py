"""Tells all ranks what failed on any of them: one integer per rank, sent beside other work.

Used with two groups: after every forward, by the thread that runs forwards, and by control commands, by the thread that schedules.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Verdict:
    """What all ranks say, once it has arrived."""

    def __init__(self, said: Tensor, work: Any) -> None:
        self._said = said
        self._work = work

    def failed(self) -> tuple[int, int] | None:
        """The lowest rank that failed, and what it said; None if all is well. Any thread; raises RuntimeError after the group's
        deadline.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        failed = self._said.nonzero()
        if not len(failed):
            return None
        rank = int(failed[0])
        return rank, int(self._said[rank])


class FailureExchange:
    """Over `group`, of all ranks; a single rank exchanges nothing. One thread posts."""

    def __init__(self, world_size: int, group: dist.ProcessGroup | None) -> None:
        self._world_size = world_size
        self._group = group

    def post(self, code: int) -> Verdict:
        """Say what failed on this rank; 0: nothing. Collective; doesn't wait."""
        if self._world_size == 1:
            return Verdict(torch.tensor([code], dtype=torch.int32), None)
        # As for step headers: an all-gather, sent as an all-to-all of copies, is faster with gloo.
        own = torch.full((self._world_size,), code, dtype=torch.int32)
        said = torch.empty_like(own)
        return Verdict(said, dist.all_to_all_single(said, own, group=self._group, async_op=True))
