"""Launchers of several nodes: the missing one is named, differing flags are named, a lost node is noticed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch.distributed
from live_server import free_port

from moesaic.launch.endpoints import tcp_endpoints
from moesaic.launch.errors import ConfigError, RendezvousError
from moesaic.launch.rendezvous import Meeting, NodeWatch, meet

# Imported before any thread asks for it: importing torch from several threads at once is not what is tested here.
assert torch.distributed.is_available()

NAMES = ("node 0 (ranks 0..7)", "node 1 (ranks 8..15)", "node 2 (ranks 16..23)")


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_port()}"


def meeting(address: str, node_rank: int, *, nodes: int = 2, timeout: float = 10.0) -> Meeting:
    return Meeting(address=address, node_rank=node_rank, names=NAMES[:nodes], timeout=timeout)


def meet_all(address: str, settings: list[Mapping[str, str]], timeout: float = 10.0) -> list[Future[object]]:
    """One thread per node, all at once; their outcomes."""
    with ThreadPoolExecutor(len(settings)) as pool:
        return [
            pool.submit(meet, meeting(address, node, nodes=len(settings), timeout=timeout), own)
            for node, own in enumerate(settings)
        ]


def test_nodes_that_were_started_alike_meet(address: str) -> None:
    outcomes = meet_all(address, [{"--tp-size": "16"}] * 3)

    assert [outcome.exception() for outcome in outcomes] == [None] * 3


def test_a_node_that_does_not_come_is_named_on_all_others(address: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        outcomes = [pool.submit(meet, meeting(address, node, nodes=3, timeout=1.5), {"--tp-size": "24"}) for node in (0, 2)]

    for outcome in outcomes:
        with pytest.raises(RendezvousError) as caught:
            outcome.result()
        assert f"node 1 (ranks 8..15) has not arrived at {address} within 1.5 s" in str(caught.value)
        assert "--node-rank 1" in str(caught.value)


def test_a_node_0_that_does_not_answer_is_named(address: str) -> None:
    started = time.monotonic()

    with pytest.raises(RendezvousError, match=rf"node 0 .* does not answer at {address} within 0.5 s"):
        meet(meeting(address, 1, timeout=0.5), {})

    assert time.monotonic() - started < 2


def test_flags_that_differ_are_named_with_both_values_on_both_nodes(address: str) -> None:
    outcomes = meet_all(address, [{"--tp-size": "16", "--dp-size": "4"}, {"--tp-size": "16", "--dp-size": "2"}])

    for outcome in outcomes:
        with pytest.raises(RendezvousError) as caught:
            outcome.result()
        assert str(caught.value).splitlines()[1:] == ["  --dp-size: 4 on node 0, 2 on node 1 (ranks 8..15)"]


def test_a_meeting_place_that_is_taken_is_said_so(address: str) -> None:
    with socket.socket() as squatter:
        host, _, port = address.rpartition(":")
        squatter.bind((host, int(port)))
        squatter.listen()
        with pytest.raises(RendezvousError, match=f"cannot listen at {address}"):
            meet(meeting(address, 0), {})


class TestWatch:
    @pytest.fixture
    def pair(self, address: str) -> Iterator[tuple[NodeWatch, NodeWatch]]:
        stores = [outcome.result() for outcome in meet_all(address, [{}] * 2)]
        watches = [NodeWatch(store, meeting(address, node)) for node, store in enumerate(stores)]  # type: ignore[arg-type]
        yield watches[0], watches[1]
        # Together, as node 0 waits for the other to leave.
        closing = threading.Thread(target=watches[0].close)
        closing.start()
        watches[1].close()
        closing.join()

    def test_all_is_well_at_first(self, pair: tuple[NodeWatch, NodeWatch]) -> None:
        time.sleep(0.6)

        assert [watch.problem() for watch in pair] == [None, None]
        assert not any(watch.stopped for watch in pair)

    @pytest.mark.parametrize("reporter", [0, 1])
    def test_a_report_reaches_the_other_node(
        self, pair: tuple[NodeWatch, NodeWatch], reporter: int, wait_until: Callable[..., None]
    ) -> None:
        pair[reporter].report("rank 9 (pid 5) was killed by SIGKILL")

        wait_until(pair[1 - reporter].problem, 2)

        assert pair[1 - reporter].problem() == "rank 9 (pid 5) was killed by SIGKILL"

    def test_the_first_report_counts(self, pair: tuple[NodeWatch, NodeWatch], wait_until: Callable[..., None]) -> None:
        pair[0].report("rank 1 died")
        pair[0].report("rank 0 gave up")

        wait_until(pair[1].problem, 2)

        assert pair[1].problem() == "rank 1 died"

    def test_a_clean_stop_is_no_problem(self, pair: tuple[NodeWatch, NodeWatch], wait_until: Callable[..., None]) -> None:
        pair[0].report_stop()

        wait_until(lambda: pair[1].stopped, 2)

        assert pair[1].problem() is None

    def test_a_node_that_falls_silent_is_named_within_five_seconds(
        self, pair: tuple[NodeWatch, NodeWatch], wait_until: Callable[..., None]
    ) -> None:
        time.sleep(0.4)
        # As if the process had stopped: nobody beats for node 1 any more.
        pair[1]._ended.set()

        wait_until(pair[0].problem, 5)

        assert str(pair[0].problem()).startswith("node 1 (ranks 8..15) has been silent")


def test_endpoints_of_several_nodes_are_the_documented_ports() -> None:
    endpoints = tcp_endpoints("127.0.0.1:5000", 3)

    assert endpoints.dist_init_method == "tcp://127.0.0.1:5001"
    assert endpoints.from_rank == "tcp://127.0.0.1:5002"
    assert endpoints.to_rank == ("tcp://127.0.0.1:5003", "tcp://127.0.0.1:5004", "tcp://127.0.0.1:5005")


def test_ports_beyond_the_last_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"65500.*choose a port up to 65469"):
        tcp_endpoints("127.0.0.1:65500", 64)


def test_an_unknown_host_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"host 'no-such-host\.invalid' is unknown"):
        tcp_endpoints("no-such-host.invalid:5000", 2)
