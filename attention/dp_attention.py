"""Moving tokens between the attention layout and the expert layout.

Inside a DP group every attention-TP rank holds the same tokens. Before an all-to-all each takes its share (scatter), so
that no token is dispatched twice; afterwards the shares are gathered again. Rank i's share is
the i-th run of ceil(T / size) tokens.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.torch_names import all_gather_single


class Communications(Protocol):
    """Where communications are posted, for those who watch them."""

    def post(self, name: str, work: dist.Work, sent: Tensor) -> Any:
        """The handle of a collective just submitted -> what to `wait` on."""
        ...


class Unwatched:
    """Nobody watches."""

    def post(self, name: str, work: dist.Work, sent: Tensor) -> dist.Work:
        return work


UNWATCHED = Unwatched()


def all_gather_rows(
    rows: Tensor, group: dist.ProcessGroup | None, size: int, name: str = "gather", communications: Communications = UNWATCHED
) -> Tensor:
    """Equal [T, ...] of each of `size` ranks -> [size * T, ...] in rank order. `name`: of the communication."""
    gathered = rows.new_empty(size * rows.shape[0], *rows.shape[1:])
    rows = rows.contiguous()
    communications.post(name, all_gather_single(gathered, rows, group=group, async_op=True), rows).wait()
    return gathered


def share_bounds(num_tokens: int, rank: int, size: int) -> tuple[int, int]:
    """[start, stop) of a rank's share of num_tokens."""
    share = -(-num_tokens // size)
    return min(rank * share, num_tokens), min((rank + 1) * share, num_tokens)


class AttentionTPGroup:
    """The ranks that split the heads of one DP group. Size 1 needs no process group and moves nothing."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None, communications: Communications = UNWATCHED) -> None:
        if size > 1 and group is None:
            raise ValueError(f"an attention-TP group of {size} ranks needs a process group")
        self.rank = rank
        self.size = size
        self.group = group
        self._communications = communications

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum [T, H] over the group, in place where it must communicate."""
        if self.size > 1 and partial.numel():
            work = dist.all_reduce(partial, group=self.group, async_op=True)
            self._communications.post("attention reduce", work, partial).wait()
        return partial

    def share_size(self, num_tokens: int) -> int:
        """Tokens in this rank's share of num_tokens."""
        start, stop = share_bounds(num_tokens, self.rank, self.size)
        return stop - start

    def scatter(self, hidden: Tensor) -> Tensor:
        """hidden [T, H], equal on all ranks -> this rank's share."""
        if self.size == 1:
            return hidden
        start, stop = share_bounds(hidden.shape[0], self.rank, self.size)
        return hidden[start:stop]

    def gather(self, share: Tensor, num_tokens: int) -> Tensor:
        """Shares of all ranks -> [num_tokens, H] on every rank."""
        if self.size == 1 or num_tokens == 0:
            return share
        width = -(-num_tokens // self.size)
        padded = share.new_zeros(width, share.shape[1])
        padded[: share.shape[0]] = share
        return all_gather_rows(padded, self.group, self.size, "attention gather", self._communications)[:num_tokens]

    def gather_columns(self, part: Tensor) -> Tensor:
        """part [T, C] of each rank -> [T, size * C] on every rank (a vocabulary split over the group)."""
        if self.size == 1 or part.shape[0] == 0:
            return part if self.size == 1 else part.new_empty(0, part.shape[1] * self.size)
        columns = all_gather_rows(part, self.group, self.size, "vocabulary gather", self._communications)
        return torch.cat(columns.chunk(self.size), dim=1)
