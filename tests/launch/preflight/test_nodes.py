"""Preflight over several nodes: the absent one is named, differences are rows with all values, links and clocks are measured."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed
from live_server import free_port

from moesaic.launch.config import ServerConfig
from moesaic.launch.demo import CHECKPOINT_DIR
from moesaic.launch.errors import RendezvousError
from moesaic.launch.preflight.command import preflight
from moesaic.launch.preflight.comparison import compare_nodes
from moesaic.launch.preflight.exchange import Echo, Exchanged, Link, exchange, measure_link
from moesaic.launch.preflight.findings import Finding
from moesaic.launch.rendezvous import Meeting

# Imported before any thread asks for it: importing torch from several threads at once is not what is tested here.
assert torch.distributed.is_available()

NAMES = ("node 0 (ranks 0..7)", "node 1 (ranks 8..15)", "node 2 (ranks 16..23)")


def on_nodes(job: Callable[[int], Any], nodes: tuple[int, ...]) -> list[Any]:
    """`job(node)` on all nodes at once."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(job, nodes))


def by_what(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_nodes_started_alike_are_ready_and_all_see_the_same() -> None:
    config = ServerConfig(
        model_path=str(CHECKPOINT_DIR),
        device="cpu",
        port=free_port(),
        tp_size=2,
        nnodes=2,
        dist_init_addr=f"127.0.0.1:{free_port(following=5)}",
        dist_timeout=20,
    )

    first, second = on_nodes(lambda node: preflight(replace(config, node_rank=node)), (0, 1))

    assert first == second
    assert {finding.status for finding in first} == {"ok"}, [finding for finding in first if finding.status != "ok"]
    rows = by_what(first)
    assert rows["nodes"].found == "all 2 were heard from"
    assert rows["model files"].node == "all nodes" and rows["ports: ranks and launchers"].node == "node 0 (rank 0)"
    assert rows["clocks"].found.startswith("within 0.")


def test_flags_that_differ_are_a_failure_with_both_values_on_both_nodes() -> None:
    config = ServerConfig(
        model_path=str(CHECKPOINT_DIR),
        device="cpu",
        port=free_port(),
        tp_size=2,
        nnodes=2,
        page_size=16,
        dist_init_addr=f"127.0.0.1:{free_port(following=5)}",
        dist_timeout=20,
    )

    both = on_nodes(lambda node: preflight(replace(config, node_rank=node, page_size=16 * (1 + node))), (0, 1))

    for findings in both:
        row = by_what(findings)["same on all nodes: --page-size"]
        assert (row.status, row.found) == ("fail", "16 on node 0 (rank 0); 32 on node 1 (rank 1)")


def test_a_node_that_is_not_there_is_named_on_all_others_and_their_rows_are_shown() -> None:
    address = f"127.0.0.1:{free_port()}"
    meeting = Meeting(address=address, node_rank=0, names=NAMES, timeout=1.0)

    both = on_nodes(lambda node: exchange(replace(meeting, node_rank=node), {"findings": [], "settings": {"a": "1"}}), (0, 2))

    for exchanged in both:
        assert sorted(exchanged.reports) == [0, 2]
        assert exchanged.links[0][2].error == exchanged.links[2][0].error == ""
        row = by_what(list(compare_nodes(NAMES, exchanged, 1.0)))["nodes"]
        assert row.status == "fail" and row.found == "node 1 (ranks 8..15): not heard from within 1 s"
        assert "--node-rank 1" in row.remedy


def test_a_node_0_that_is_not_there_is_named_within_the_deadline() -> None:
    meeting = Meeting(address=f"127.0.0.1:{free_port()}", node_rank=1, names=NAMES, timeout=0.5)
    started = time.monotonic()

    with pytest.raises(RendezvousError, match=r"node 0 \(ranks 0\.\.7\) does not answer"):
        exchange(meeting, {"findings": [], "settings": {}})

    assert time.monotonic() - started < 3


def test_a_link_is_measured_and_one_that_is_closed_is_an_error() -> None:
    with Echo("127.0.0.1") as echo:
        link = measure_link(echo.host, echo.port)
    assert not link.error and 0 < link.round_trip_ms < 100 and abs(link.clock_ms) < 100

    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert f"127.0.0.1:{port}: " in measure_link("127.0.0.1", port).error


def exchanged_with(link: Link, back: Link, settings: dict[str, str] | None = None) -> Exchanged:
    reports = {0: {"settings": {"GPU driver": "570.1"}}, 1: {"settings": settings or {"GPU driver": "570.1"}}}
    return Exchanged(reports=reports, links={0: {1: link}, 1: {0: back}})


def rows_of(exchanged: Exchanged) -> dict[str, Finding]:
    return by_what(list(compare_nodes(NAMES[:2], exchanged, 60.0)))


def test_a_clock_that_is_wrong_is_named_with_its_direction() -> None:
    row = rows_of(exchanged_with(Link(round_trip_ms=0.1, clock_ms=2500), Link(round_trip_ms=0.1, clock_ms=-2500)))["clocks"]

    assert row.status == "warn"
    assert row.found in {
        "node 1 (ranks 8..15) is 2.50 s ahead of node 0 (ranks 0..7)",
        "node 0 (ranks 0..7) is 2.50 s behind node 1 (ranks 8..15)",
    }


def test_a_clock_difference_within_the_round_trip_is_none() -> None:
    slow = Link(round_trip_ms=900, clock_ms=420)
    rows = rows_of(exchanged_with(slow, slow))

    assert rows["clocks"].status == "ok"
    assert rows["round trip between nodes"].status == "warn" and "slowest 900.000 ms" in rows["round trip between nodes"].found


def test_nodes_that_do_not_reach_each_other_are_a_failure() -> None:
    row = rows_of(exchanged_with(Link(error="10.0.0.2:4711: timed out"), Link(round_trip_ms=0.1)))["reachability"]

    assert row.status == "fail"
    assert row.found == "node 0 (ranks 0..7) does not reach node 1 (ranks 8..15) at 10.0.0.2:4711: timed out"


@pytest.mark.parametrize(
    ("name", "wanted"), [("GPU driver", "warn"), ("NVSHMEM version", "fail"), ("--tp-size", "fail"), ("moesaic version", "fail")]
)
def test_what_must_be_alike_fails_and_what_should_be_warns(name: str, wanted: str) -> None:
    exchanged = exchanged_with(Link(round_trip_ms=0.1), Link(round_trip_ms=0.1), {"GPU driver": "570.1", name: "another"})

    assert rows_of(exchanged)[f"same on all nodes: {name}"].status == wanted
