"""The choice of the DP rank for a new sequence, from the ranks' load reports and what was sent since.

Pure: no sockets, no clock. "Unseen" are requests that were sent but are not yet counted in the rank's last report; as
ranks take requests in order, they are always the newest ones.
"""

from __future__ import annotations

from itertools import islice

from moesaic.launch.engine.messages import LoadReport

METHODS = ("auto", "total_tokens", "total_requests", "round_robin")


def no_load(dp_rank: int, max_total_num_tokens: int) -> LoadReport:
    """The report of a DP rank that has not worked yet."""
    return LoadReport(
        dp_rank=dp_rank,
        num_running_reqs=0,
        num_waiting_reqs=0,
        num_used_tokens=0,
        max_total_num_tokens=max_total_num_tokens,
        num_waiting_tokens=0,
        gen_throughput=0.0,
        cache_hit_rate=0.0,
        num_retracted_reqs=0,
    )


class _DpLoad:
    """One DP rank as seen from here: requests in flight (rid -> prompt tokens, in order of sending) and its last
    report.
    """

    def __init__(self) -> None:
        self.in_flight: dict[int, int] = {}
        self.report: LoadReport | None = None
        self.unseen_tokens = 0

    def num_unseen(self) -> int:
        if self.report is None:
            return len(self.in_flight)
        return max(0, len(self.in_flight) - self.report.num_running_reqs - self.report.num_waiting_reqs)

    def take(self, report: LoadReport) -> None:
        self.report = report
        self.unseen_tokens = sum(islice(reversed(self.in_flight.values()), self.num_unseen()))

    def num_tokens(self) -> int:
        known = 0 if self.report is None else self.report.num_used_tokens + self.report.num_waiting_tokens
        return known + self.unseen_tokens

    def num_free(self, max_running: int) -> int:
        """Places in the running batch for newcomers: none while others wait already, for want of memory or places."""
        if self.report is not None and min(self.report.num_waiting_reqs, len(self.in_flight)) > 0:
            return 0
        return max(0, max_running - len(self.in_flight))

    def num_queued(self, max_running: int) -> int:
        """Requests that have no place in the running batch."""
        waiting = 0 if self.report is None else self.report.num_waiting_reqs
        if waiting == 0:
            return max(0, len(self.in_flight) - max_running)
        return min(len(self.in_flight), waiting + self.num_unseen())


class Balancer:
    """Chooses DP ranks. Every request is announced by `sent` and taken back by `done`."""

    def __init__(self, method: str, dp_size: int) -> None:
        if method not in METHODS:
            raise ValueError(f"--load-balance-method {method!r} is not one of {', '.join(METHODS)}")
        self._method = "total_tokens" if method == "auto" else method
        self._loads = [_DpLoad() for _ in range(dp_size)]
        self._next = 0

    def choose(self, pinned: int | None = None) -> int:
        """The DP rank for the next request; `pinned` if given. ValueError when it does not exist."""
        if pinned is not None:
            if not 0 <= pinned < len(self._loads):
                raise ValueError(f"DP rank {pinned} does not exist: there are {len(self._loads)}, counted from 0")
            return pinned
        if self._method == "round_robin":
            chosen, self._next = self._next, (self._next + 1) % len(self._loads)
            return chosen
        return min(range(len(self._loads)), key=self._cost)

    def _cost(self, dp_rank: int) -> tuple[int, ...]:
        load = self._loads[dp_rank]
        if self._method == "total_requests":
            return len(load.in_flight), load.num_tokens(), dp_rank
        return load.num_tokens(), len(load.in_flight), dp_rank

    def sent(self, dp_rank: int, rid: int, num_tokens: int) -> None:
        load = self._loads[dp_rank]
        load.in_flight[rid] = num_tokens
        load.unseen_tokens += num_tokens

    def done(self, dp_rank: int, rid: int) -> None:
        load = self._loads[dp_rank]
        load.in_flight.pop(rid, None)
        if not load.in_flight:
            load.unseen_tokens = 0

    def report(self, report: LoadReport) -> None:
        if 0 <= report.dp_rank < len(self._loads):
            self._loads[report.dp_rank].take(report)

    def num_queued(self, max_running: int) -> int:
        """Requests waiting for a place, over all DP ranks. `max_running` is the limit of one DP rank."""
        return sum(load.num_queued(max_running) for load in self._loads)

    def room(self, max_running: int, max_queued: int) -> int:
        """How many more requests can be taken before more than `max_queued` wait; never negative."""
        free = sum(load.num_free(max_running) for load in self._loads)
        return max(0, free + max_queued - self.num_queued(max_running))

    def last_reports(self) -> list[LoadReport | None]:
        return [load.report for load in self._loads]
