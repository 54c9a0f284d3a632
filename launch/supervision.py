"""Has the server failed, and who is to blame? One rank's death makes others fail within milliseconds: the first is to
be named.

Knows processes (`WorkerGroup`) and other nodes (`NodeWatch`), not what either does. A killed rank is blamed at once; a
rank that ended by itself may only have given up on another one, so for a moment a better culprit is waited for.
"""

from __future__ import annotations

import time

from moesaic.launch.rendezvous import NodeWatch
from moesaic.launch.workers import WorkerGroup

SUPERVISION_SECONDS = 0.1
# Longer than a lost node needs to become suspect.
BLAME_SECONDS = 1.5


class Supervisor:
    """Ask `culprit` every `SUPERVISION_SECONDS`. What it says of this node's ranks, it also tells the other nodes."""

    def __init__(self, workers: WorkerGroup, watch: NodeWatch | None) -> None:
        self._workers = workers
        self._watch = watch
        self._first_exit_at: float | None = None

    def culprit(self) -> str | None:
        """One line that names the rank or node that failed, or None."""
        exits = self._workers.exits()
        if (certain := self._certain_culprit(failing=bool(exits))) is not None:
            return certain
        if not exits:
            return None
        now = time.monotonic()
        self._first_exit_at = self._first_exit_at or now
        return self._report(str(exits[0])) if now - self._first_exit_at > BLAME_SECONDS else None

    def await_certain_culprit(self) -> str | None:
        """After a failure that was told in another way: who caused it, if that shows within `BLAME_SECONDS`."""
        deadline = time.monotonic() + BLAME_SECONDS
        while (culprit := self._certain_culprit(failing=True)) is None and time.monotonic() < deadline:
            time.sleep(SUPERVISION_SECONDS)
        return culprit

    def _certain_culprit(self, *, failing: bool) -> str | None:
        """A rank that was killed, what another node said, or, while something fails, a node that says nothing."""
        exits = self._workers.exits()
        if exits and exits[0].killed:
            return self._report(str(exits[0]))
        if self._watch is None:
            return None
        if (problem := self._watch.problem()) is not None:
            return problem
        suspect = self._watch.suspect() if failing else None
        return None if suspect is None else self._report(suspect)

    def _report(self, culprit: str) -> str:
        if self._watch is not None:
            self._watch.report(culprit)
        return culprit
