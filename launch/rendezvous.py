"""The launchers of a server of several nodes meet, agree that they were started alike, and watch each other.

They share a `torch.distributed.TCPStore` at `--dist-init-addr`, hosted by node 0's launcher. Keys: `node/i` a node's
settings, `verdict` node 0's decision ("go", or why not), `beat/i` a counter that a living launcher raises, `down` the
first culprit, `stop` set by node 0 for a clean end, `left/i` set by a node that has read either. Knows no ranks' work:
a node is a name here.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from moesaic.launch.endpoints import split_address
from moesaic.launch.errors import RendezvousError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

GO = "go"
POLL_SECONDS = 0.1
BEAT_SECONDS = 0.25
SILENT_SECONDS = 3.0
SUSPECT_SECONDS = 0.8


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Who meets where.

    `timeout` in seconds. `names[i]` is how node i is called in messages, such as "node 1 (ranks 8..15)".
    """

    address: str
    node_rank: int
    names: tuple[str, ...]
    timeout: float

    @property
    def others(self) -> list[int]:
        return [node for node in range(len(self.names)) if node != self.node_rank]


def meet(meeting: Meeting, settings: Mapping[str, str]) -> TCPStore:
    """Wait for all nodes and compare `settings`, which must be equal on all.

    Raises RendezvousError that names the culprit.
    """
    from torch.distributed import DistError

    deadline = time.monotonic() + meeting.timeout
    store = open_store(meeting, deadline)
    try:
        store.set(f"node/{meeting.node_rank}", json.dumps(dict(settings)))
        verdict = _judge(meeting, store, deadline) if meeting.node_rank == 0 else _await_verdict(meeting, store, deadline)
        if meeting.node_rank == 0:
            store.set("verdict", verdict)
        if verdict != GO:
            _leave(store, meeting, meeting.others)
    except DistError:
        verdict = f"{meeting.names[0]} went away from {meeting.address} while the nodes were meeting"
    if verdict != GO:
        raise RendezvousError(verdict)
    return store


def open_store(meeting: Meeting, deadline: float) -> TCPStore:
    """The nodes' common store; node 0 hosts it. Raises RendezvousError when it can't be had until `deadline` (monotonic)."""
    from torch._C import _distributed_c10d as c10d
    from torch.distributed import DistError

    host, port = split_address(meeting.address)
    hosting = meeting.node_rank == 0
    if not hosting:
        _await_listener(meeting, deadline)
    try:
        timeout = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        return c10d.TCPStore(host, port, is_master=hosting, wait_for_workers=False, timeout=timeout)
    except DistError as error:
        doing = "cannot listen at" if hosting else "cannot talk to node 0 at"
        reason = str(error).splitlines()[0]
        raise RendezvousError(f"{doing} {meeting.address} (--dist-init-addr): {reason}") from None


def _await_listener(meeting: Meeting, deadline: float) -> None:
    """Wait in Python until node 0 listens: torch's own wait cannot be interrupted by Ctrl-C."""
    address = split_address(meeting.address)
    while True:
        try:
            with socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"{meeting.names[0]} does not answer at {meeting.address} within {meeting.timeout:g} s ({error}); "
                    "start it with --node-rank 0 on that host, and check --dist-init-addr and the firewall"
                ) from None
        time.sleep(POLL_SECONDS)


def _judge(meeting: Meeting, store: TCPStore, deadline: float) -> str:
    """Node 0: "go", or which nodes have not arrived, or how their settings differ."""
    missing = list(meeting.others)
    while missing:
        missing = [node for node in missing if not store.check([f"node/{node}"])]
        if missing and time.monotonic() > deadline:
            absent = " and ".join(meeting.names[node] for node in missing)
            verb = "has" if len(missing) == 1 else "have"
            numbers = " or ".join(map(str, missing))
            return (
                f"{absent} {verb} not arrived at {meeting.address} within "
                f"{meeting.timeout:g} s; run the same command there with --node-rank {numbers}"
            )
        time.sleep(POLL_SECONDS if missing else 0)
    mine = json.loads(store.get("node/0"))
    differences = [
        line for node in meeting.others for line in _differences(meeting.names[node], mine, json.loads(store.get(f"node/{node}")))
    ]
    return "\n".join(["the nodes were started differently:", *differences]) if differences else GO


def _differences(name: str, mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    keys = [*mine, *(key for key in theirs if key not in mine)]
    return [
        f"  {key}: {mine.get(key, 'absent')} on node 0, {theirs.get(key, 'absent')} on {name}"
        for key in keys
        if mine.get(key) != theirs.get(key)
    ]


def _await_verdict(meeting: Meeting, store: TCPStore, deadline: float) -> str:
    # Node 0 may have started its own deadline later than this node: it decides, this is only for a node 0 that hangs.
    patience = deadline + meeting.timeout
    while not store.check(["verdict"]):
        if time.monotonic() > patience:
            return f"{meeting.names[0]} at {meeting.address} has not decided within {2 * meeting.timeout:g} s"
        time.sleep(POLL_SECONDS)
    return store.get("verdict").decode()


def _leave(store: TCPStore, meeting: Meeting, others: list[int], seconds: float = 2.0) -> None:
    """Say that this node has read the end. The store ends with node 0's process, so that one waits for `others`."""
    deadline = time.monotonic() + seconds
    store.set(f"left/{meeting.node_rank}", "1")
    if meeting.node_rank == 0:
        arrived = [f"left/{node}" for node in others if store.check([f"node/{node}"])]
        while arrived and not store.check(arrived) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


class NodeWatch:
    """Says when another node, or this one's connection to node 0, has failed; and tells the others when this one has.

    A thread beats and listens; `problem` and `stopped` may be read from any other. `close` says goodbye.
    """

    def __init__(self, store: TCPStore, meeting: Meeting) -> None:
        self._store = store
        self._meeting = meeting
        self._ended = threading.Event()
        self._problem: str | None = None
        self._stopped = False
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._moved_at = time.monotonic()
        store.set_timeout(timedelta(seconds=SILENT_SECONDS))
        self._thread = threading.Thread(target=self._run, name="node watch", daemon=True)
        self._thread.start()

    @property
    def stopped(self) -> bool:
        """Node 0 has ended the server in good order."""
        return self._stopped

    def problem(self) -> str | None:
        """The culprit's name and what it did, or None."""
        if self._problem is None and time.monotonic() - self._moved_at > 2 * SILENT_SECONDS:
            return f"no answer from {self._meeting.names[0]} at {self._meeting.address}"
        return self._problem

    def suspect(self) -> str | None:
        """The node that is late with its beat: no problem in itself, but the one to blame when something else has
        failed.
        """
        late = self._silent_nodes(SUSPECT_SECONDS)
        return self._silence(late[0]) if late else None

    def report(self, culprit: str) -> None:
        """Tell every node that the server has failed, and why. The first report counts."""
        self._end_with("down", culprit)

    def report_stop(self) -> None:
        """Node 0: tell every node that the server ends in good order."""
        self._end_with("stop", "1")

    def _end_with(self, key: str, value: str) -> None:
        self._ended.set()
        self._thread.join(timeout=2 * SILENT_SECONDS)
        with contextlib.suppress(Exception):
            if not self._store.check(["down"]):
                self._store.set(key, value)

    def close(self) -> None:
        """Stop watching. Node 0 keeps the store until the others have read the end, or for 2 s."""
        self._ended.set()
        self._thread.join(timeout=2 * SILENT_SECONDS)
        with contextlib.suppress(Exception):
            # A node that is gone will not say that it leaves.
            alive = [node for node in self._meeting.others if node not in self._silent_nodes(SUSPECT_SECONDS)]
            _leave(self._store, self._meeting, alive)

    def _run(self) -> None:
        from torch.distributed import DistError

        count = 0
        while not self._ended.wait(BEAT_SECONDS) and self._problem is None and not self._stopped:
            count += 1
            try:
                self._store.set(f"beat/{self._meeting.node_rank}", str(count))
                self._listen()
            except DistError:
                self._problem = f"{self._meeting.names[0]} is gone: the connection to {self._meeting.address} was lost"
            self._moved_at = time.monotonic()

    def _listen(self) -> None:
        if self._store.check(["down"]):
            self._problem = self._store.get("down").decode()
        elif self._store.check(["stop"]):
            self._stopped = True
        else:
            self._note_beats()
            if silent := self._silent_nodes(SILENT_SECONDS):
                self._problem = self._silence(silent[0])
                self._store.set("down", self._problem)

    def _note_beats(self) -> None:
        """Node 0 judges the others, and the others judge node 0: one voice on each."""
        now = time.monotonic()
        for node in self._meeting.others if self._meeting.node_rank == 0 else [0]:
            beat = self._store.get(f"beat/{node}") if self._store.check([f"beat/{node}"]) else b""
            last, _ = self._beats.setdefault(node, (beat, now))
            if beat != last:
                self._beats[node] = (beat, now)

    def _silent_nodes(self, seconds: float) -> list[int]:
        """Those whose last beat is older than `seconds` before this node last looked."""
        return [node for node, (_, since) in self._beats.items() if self._moved_at - since > seconds]

    def _silence(self, node: int) -> str:
        silent_for = self._moved_at - self._beats[node][1]
        return f"{self._meeting.names[node]} has been silent for {silent_for:.1f} s"
