"""Collectives over a staged group beside the same over gloo: jobs for a RankPool."""

from __future__ import annotations

import time
from typing import Any

import rank_pool
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.attention.dp_attention import all_gather_rows
from moesaic.eplb.transfer import ProcessGroupWire
from moesaic.moe.communication import Collective

DEADLINE_S = 10.0
Form = tuple[torch.dtype, str]
"""Of tensors: dtype and device."""


def _rows(rank: int, world: int, form: Form) -> Tensor:
    """rank + 1 rows for each rank, of 3."""
    dtype, device = form
    return (torch.arange(3 * (rank + 1) * world).view(-1, 3) + 100 * rank).to(dtype).to(device)


def _reduced(group: Any, rank: int, world: int, form: Form) -> Tensor:
    rows = _rows(0, world, form) * (rank + 1)
    dist.all_reduce(rows, group=group)
    return rows


def _exchanged(group: Any, rank: int, world: int, form: Form) -> Tensor:
    rows = _rows(rank, world, form)
    counts = [peer + 1 for peer in range(world)]
    received = rows.new_zeros(sum(counts), 3)
    dist.all_to_all_single(received, rows, counts, [rank + 1] * world, group=group, async_op=True).wait()
    return received


def _gathered(group: Any, rank: int, world: int, form: Form) -> Tensor:
    return all_gather_rows(_rows(0, world, form) + rank, group, world)


def _broadcast(group: Any, rank: int, world: int, form: Form) -> Tensor:
    rows = _rows(0, world, form) + rank
    dist.broadcast(rows, src=world - 1, group=group)
    return rows


def _from_neighbour(group: Any, rank: int, world: int, form: Form) -> Tensor:
    """As expert weights travel."""
    wire, received = ProcessGroupWire(group), _rows(0, world, form) * 0
    exchange = wire.post([((rank + 1) % world, _rows(0, world, form) + rank)], [], 5)
    arriving = wire.post([], [((rank - 1) % world, received)], 5)
    deadline = time.monotonic() + DEADLINE_S
    while not (exchange.done() and arriving.done()):
        assert time.monotonic() < deadline, f"not through within {DEADLINE_S} s"
        time.sleep(0.001)
    return received


OPERATIONS = (_reduced, _exchanged, _gathered, _broadcast, _from_neighbour)


def both_ways_job(rank: int, world: int, dtypes: tuple[torch.dtype, ...], device: str) -> list[tuple[str, Tensor, Tensor]]:
    """Each operation of each dtype, staged and on the CPU without."""
    ranks = tuple(range(world))
    staged, plain = rank_pool.staged_group_of(ranks), rank_pool.group_of(ranks)
    with torch.inference_mode():
        return [
            (
                f"{call.__name__} {dtype}",
                call(staged, rank, world, (dtype, device)).cpu(),
                call(plain, rank, world, (dtype, "cpu")),
            )
            for call in OPERATIONS
            for dtype in dtypes
        ]


def arrival_job(rank: int, device: str) -> tuple[list[float], list[float], list[float]]:
    """What was received before anybody waits; once the waiting is over; when a callback says so, which nobody waits for."""
    group = rank_pool.staged_group_of((0, 1))
    received = torch.zeros(2, device=device)
    sent = torch.full((2,), 1.0 + rank, device=device)
    work = dist.all_to_all_single(received, sent, group=group, async_op=True)
    before = received.tolist()
    work.wait()
    after = received.tolist()

    told: torch.futures.Future[list[float]] = torch.futures.Future()
    again = torch.zeros(2, device=device)
    pending = Collective(dist.all_to_all_single(again, sent + 2, group=group, async_op=True))
    pending.when_done(lambda: told.set_result(again.tolist()))
    return before, after, told.wait()
