"""All nodes tell each other what they found, and try whether they reach each other: round trips and clocks.

Over the rendezvous of `moesaic serve` (`launch/rendezvous.py`), under keys of its own: `preflight/report/i` what node i says,
`roll` the nodes that node 0 has heard from, `links/i` how node i reached the others, `done/i` that it has read everything. Every
wait has a deadline, after which the missing nodes are known. Knows no finding.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from moesaic.launch.errors import RendezvousError
from moesaic.launch.preflight.network import local_address
from moesaic.launch.rendezvous import POLL_SECONDS, Meeting, open_store

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

PREFIX = "preflight"
PINGS = 8
PING_SECONDS = 3.0
LINK_SECONDS = 20.0
LEAVE_SECONDS = 3.0
CLOCK = struct.Struct("!d")


@dataclass(frozen=True, kw_only=True)
class Link:
    """How one node reached another, or the `error`. `clock_ms`: how far ahead the other's clock is, to within half a round trip."""

    round_trip_ms: float = 0.0
    clock_ms: float = 0.0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """`reports[node]` of every node heard from, alike on all of them; `links[node][other]` between these."""

    reports: Mapping[int, Mapping[str, Any]]
    links: Mapping[int, Mapping[int, Link]]


class Echo:
    """Answers every byte with this machine's clock, at a port that the system chooses: the way gloo's and NCCL's ranks connect."""

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0))
        self.host, self.port = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, name="preflight echo", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PING_SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=_answer, args=(connection,), name="preflight echo answer", daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(PING_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while connection.recv(1):
            connection.sendall(CLOCK.pack(time.time()))


def measure_link(host: str, port: int) -> Link:
    """Of several round trips the fastest, and the other's clock in its middle (Cristian, 1989)."""
    try:
        with socket.create_connection((host, port), timeout=PING_SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips = [_ping(connection) for _ in range(PINGS)]
    except OSError as error:
        return Link(error=f"{host}:{port}: {error}")
    seconds, ahead = min(trips)
    return Link(round_trip_ms=1000 * seconds, clock_ms=1000 * ahead)


def _ping(connection: socket.socket) -> tuple[float, float]:
    started, begun = time.time(), time.perf_counter()
    connection.sendall(b"?")
    answer = b""
    while len(answer) < CLOCK.size:
        part = connection.recv(CLOCK.size - len(answer))
        if not part:
            raise OSError("closed by the other side")
        answer += part
    seconds = time.perf_counter() - begun
    return seconds, float(CLOCK.unpack(answer)[0]) - (started + seconds / 2)


def exchange(meeting: Meeting, report: Mapping[str, Any]) -> Exchanged:
    """Collective over the nodes that come; absent ones are in neither result. Raises RendezvousError where node 0 can't be met."""
    from torch.distributed import DistError

    deadline = time.monotonic() + meeting.timeout
    store = open_store(meeting, deadline)
    try:
        with Echo(local_address(meeting.address)) as echo:
            mine = {**report, "echo": [echo.host, echo.port]}
            store.set(f"{PREFIX}/report/{meeting.node_rank}", json.dumps(mine))
            present = _roll_call(meeting, store, deadline)
            reports = {node: json.loads(store.get(f"{PREFIX}/report/{node}")) for node in present}
            links = _measure_links(meeting, store, reports)
            _finish(meeting, store, present)
    except DistError as error:
        reason = str(error).splitlines()[0]
        raise RendezvousError(f"{meeting.names[0]} went away from {meeting.address} during the preflight ({reason})") from None
    return Exchanged(reports=reports, links=links)


def _roll_call(meeting: Meeting, store: TCPStore, deadline: float) -> list[int]:
    """The nodes that node 0 has heard from by its deadline: the same list on all."""
    if meeting.node_rank == 0:
        keys = {node: f"{PREFIX}/report/{node}" for node in range(len(meeting.names))}
        missing = _await_keys(store, list(keys.values()), deadline)
        present = [node for node, key in keys.items() if key not in missing]
        store.set(f"{PREFIX}/roll", json.dumps(present))
        return present
    # Node 0 may have begun later than this node.
    if _await_keys(store, [f"{PREFIX}/roll"], deadline + meeting.timeout):
        serving = " (it runs `moesaic serve`)" if store.check(["node/0"]) else ""
        raise RendezvousError(
            f"{meeting.names[0]} at {meeting.address} has not called the roll within {2 * meeting.timeout:g} s{serving}; "
            "run `moesaic preflight` there too"
        )
    present = json.loads(store.get(f"{PREFIX}/roll"))
    if meeting.node_rank not in present:
        raise RendezvousError(f"{meeting.names[0]} had ended its preflight when this node came; start all nodes together")
    return [int(node) for node in present]


def _measure_links(meeting: Meeting, store: TCPStore, reports: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[int, Link]]:
    """From every node to every other one, at the same time on all nodes."""
    own = {node: asdict(measure_link(*reports[node]["echo"])) for node in reports if node != meeting.node_rank}
    store.set(f"{PREFIX}/links/{meeting.node_rank}", json.dumps(own))
    keys = {node: f"{PREFIX}/links/{node}" for node in reports}
    missing = _await_keys(store, list(keys.values()), time.monotonic() + LINK_SECONDS)
    found = {node: json.loads(store.get(key)) for node, key in keys.items() if key not in missing}
    return {node: {int(other): Link(**link) for other, link in links.items()} for node, links in found.items()}


def _finish(meeting: Meeting, store: TCPStore, present: list[int]) -> None:
    """Nobody closes its echo, and node 0 not its store, before all have read everything."""
    store.set(f"{PREFIX}/done/{meeting.node_rank}", "1")
    if meeting.node_rank == 0:
        _await_keys(store, [f"{PREFIX}/done/{node}" for node in present], time.monotonic() + LEAVE_SECONDS)


def _await_keys(store: TCPStore, keys: list[str], deadline: float) -> list[str]:
    """Those that are not there at the deadline."""
    missing = keys
    while missing := [key for key in missing if not store.check([key])]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return missing
