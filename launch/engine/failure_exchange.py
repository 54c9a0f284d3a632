"""Tells all ranks whether something failed on one of them: one integer per rank, sent beside other work.

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

    def failed_rank(self) -> int | None:
        """The lowest rank that failed; None if all is well. Any thread; raises RuntimeError after the group's deadline."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        failed = self._said.nonzero()
        return int(failed[0]) if len(failed) else None


class FailureExchange:
    """Over `group`, of all ranks; a single rank exchanges nothing. One thread posts."""

    def __init__(self, world_size: int, group: dist.ProcessGroup | None) -> None:
        self._world_size = world_size
        self._group = group

    def post(self, failed: bool) -> Verdict:
        """Say whether this rank failed. Collective; doesn't wait."""
        if self._world_size == 1:
            return Verdict(torch.tensor([failed]), None)
        # As for step headers: an all-gather, sent as an all-to-all of copies, is faster with gloo.
        own = torch.full((self._world_size,), failed, dtype=torch.uint8)
        said = torch.empty_like(own)
        return Verdict(said, dist.all_to_all_single(said, own, group=self._group, async_op=True))
