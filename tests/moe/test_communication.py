"""Where communications are posted: nothing is in the way unless somebody watches; a transport comes before a timeline."""

from __future__ import annotations

import pytest
import rank_pool as pool
import torch
import torch.distributed as dist
from emulated_network import Delayed
from rank_pool import RankPool

from moesaic.moe.communication import Collective, Communications, Pending


class _Holds:
    """A transport that completes what it is told to."""

    def __init__(self) -> None:
        self.held: list[Delayed] = []
        self.seen: list[tuple[str, int]] = []

    def posted(self, name: str, pending: Pending, num_bytes: int) -> Pending:
        self.seen.append((name, num_bytes))
        self.held.append(Delayed(pending))
        return self.held[-1]


class _Notes:
    """Marks that note the names of what is submitted and of what is done."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def posted(self, name: str, pending: Pending, num_bytes: int) -> Pending:
        self.log.append(f"{name} begins")
        pending.when_done(lambda: self.log.append(f"{name} ends"))
        return pending


def posted_job(rank: int) -> tuple[list[str], list[str], list[tuple[str, int]], float]:
    """A real all-reduce: marks before and after the transport lets it complete, what the transport saw, and the sum."""
    communications, transport, marks = Communications(), _Holds(), _Notes()
    value = torch.full((3,), rank + 1.0)
    work = dist.all_reduce(value, group=pool.group_of((0, 1)), async_op=True)
    assert communications.post("reduce", work, value) is work, "unwatched, the collective itself is waited on"
    work.wait()
    communications.transport, communications.marks = transport, marks
    work = dist.all_reduce(value, group=pool.group_of((0, 1)), async_op=True)
    pending = communications.post("reduce", work, value)
    work.wait()
    before = list(marks.log)
    transport.held[0].complete()
    pending.wait()
    return before, marks.log, transport.seen, float(value[0])


def test_marks_see_a_communication_as_the_transport_delivers_it(rank_pool: RankPool) -> None:
    for before, after, seen, total in rank_pool.run(2, posted_job):
        assert before == ["reduce begins"]
        assert after == ["reduce begins", "reduce ends"]
        assert seen == [("reduce", 12)]
        assert total == 6.0


class _FailedWork:
    """As much of a collective as `when_done` looks at, failed: gloo takes a minute to fail by itself."""

    def __init__(self) -> None:
        self._future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        self._future.set_exception(RuntimeError("timed out"))  # type: ignore[no-untyped-call]

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        return self._future


@pytest.mark.parametrize("watchers", [1, 2])
def test_of_a_failed_collective_nobody_is_told_that_it_is_done(watchers: int) -> None:
    told: list[int] = []
    pending = Collective(_FailedWork())  # type: ignore[arg-type]
    for number in range(watchers):
        pending.when_done(lambda number=number: told.append(number))  # type: ignore[misc]
    assert not told
