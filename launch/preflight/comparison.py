"""What all nodes' reports say together: who is missing, what differs, who does not reach whom, whose clock is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from moesaic.launch.preflight.exchange import Exchanged, Link
from moesaic.launch.preflight.findings import Finding, fail, ok, warn

CLOCK_WARN_MS = 100.0
"""Beyond this, logs and timelines of two nodes can't be read beside each other. moesaic's own deadlines use no wall clock."""
ROUND_TRIP_WARN_MS = 1.0
"""Within a data centre it is tens of microseconds; a millisecond is another site, a tunnel or a wrong interface."""
MAY_DIFFER = frozenset({"GPU driver", "DeepGEMM version", "triton version", "GPUs", "checkpoint files"})
"""What works when it differs, if not alike: a warning."""


def compare_nodes(names: Sequence[str], exchanged: Exchanged, seconds: float) -> Iterator[Finding]:
    """Rows about all nodes together; alike on every node. `seconds`: how long absent nodes were waited for."""
    yield _attendance(names, exchanged, seconds)
    yield from _settings(names, {node: report["settings"] for node, report in exchanged.reports.items()})
    if len(exchanged.reports) > 1:
        yield from _links(names, exchanged.links)


def _attendance(names: Sequence[str], exchanged: Exchanged, seconds: float) -> Finding:
    absent = [node for node in range(len(names)) if node not in exchanged.reports]
    if not absent:
        return ok("nodes", f"all {len(names)} were heard from")
    who = " and ".join(names[node] for node in absent)
    remedy = (
        f"run the same preflight there with --node-rank {' or '.join(map(str, absent))}; check --dist-init-addr and the firewall"
    )
    return fail("nodes", f"{who}: not heard from within {seconds:g} s", remedy)


def _settings(names: Sequence[str], settings: Mapping[int, Mapping[str, str]]) -> Iterator[Finding]:
    """A row for each setting that differs, with all its values, or one that says that none does."""
    keys = list(dict.fromkeys(key for own in settings.values() for key in own))
    differ = False
    for key in keys:
        values: dict[str, list[int]] = {}
        for node, own in settings.items():
            values.setdefault(own.get(key, "absent"), []).append(node)
        if len(values) > 1:
            differ = True
            found = "; ".join(f"{value} on {' and '.join(names[node] for node in nodes)}" for value, nodes in values.items())
            make, remedy = (warn, "make it the same to be sure") if key in MAY_DIFFER else (fail, "make it the same on every node")
            yield make(f"same on all nodes: {key}", found, remedy)
    if not differ:
        yield ok("same on all nodes", f"flags, versions, model and placement ({len(keys)} settings)")


def _links(names: Sequence[str], links: Mapping[int, Mapping[int, Link]]) -> Iterator[Finding]:
    pairs = [(node, other, link) for node, own in links.items() for other, link in own.items()]
    broken = [(node, other, link) for node, other, link in pairs if link.error]
    for node, other, link in broken:
        remedy = "gloo and NCCL connect all nodes at ports that the system chooses: open the firewall between the nodes"
        yield fail("reachability", f"{names[node]} does not reach {names[other]} at {link.error}", remedy)
    working = [(node, other, link) for node, other, link in pairs if not link.error]
    if not working:
        return
    slow = max(working, key=lambda pair: pair[2].round_trip_ms)
    slowest = slow[2].round_trip_ms
    found = f"median {median(link.round_trip_ms for _, _, link in working):.3f} ms, slowest {slowest:.3f} ms"
    if slowest > ROUND_TRIP_WARN_MS:
        found += f" ({names[slow[0]]} to {names[slow[1]]})"
        yield warn(
            "round trip between nodes", found, "take the interface of the fast network (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        )
    else:
        yield ok("round trip between nodes", found)
    yield _clocks(names, working)


def _clocks(names: Sequence[str], working: Sequence[tuple[int, int, Link]]) -> Finding:
    """The largest difference between two clocks that is certain: beyond half the round trip that it was seen through."""
    certain = [(max(0.0, abs(link.clock_ms) - link.round_trip_ms / 2), node, other, link) for node, other, link in working]
    skew, node, other, link = max(certain, key=lambda pair: pair[0])
    if skew <= CLOCK_WARN_MS:
        return ok("clocks", f"within {max(skew, 0.1):.1f} ms of each other")
    ahead = "ahead of" if link.clock_ms > 0 else "behind"
    found = f"{names[other]} is {abs(link.clock_ms) / 1000:.2f} s {ahead} {names[node]}"
    return warn("clocks", found, "start chrony or ntpd on both; logs and timelines can't be compared until then")
