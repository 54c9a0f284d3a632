"""The bootstrap server over real HTTP: registration, topology, and everything that is wrong with either."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from live_server import free_port
from pd_ranks import make_layout

from moesaic.launch.disaggregation.bootstrap import BootstrapServer, Registration, registration
from moesaic.launch.disaggregation.bootstrap_client import BootstrapError, fetch_topology, register_rank
from moesaic.launch.disaggregation.protocol import KVLayout, LayoutMismatchError


@pytest.fixture
def server() -> Iterator[BootstrapServer]:
    with BootstrapServer(port=0) as server:
        yield server


@pytest.fixture
def address(server: BootstrapServer) -> str:
    return f"127.0.0.1:{server.address[1]}"


def rank(layout: KVLayout, number: int, instance: str = "p0") -> Registration:
    dp_rank, attn_tp_rank = divmod(number, layout.attn_tp_size)
    place = ("127.0.0.1", 5000 + number)
    return registration(layout, instance=instance, dp_rank=dp_rank, attn_tp_rank=attn_tp_rank, address=place)


def ask(address: str, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    host, port = address.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    connection.request(method, path, body)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if text.startswith("{") else text


def route(dp: int, cp: int, tp: int, pp: int) -> str:
    return f"/route?prefill_dp_rank={dp}&prefill_cp_rank={cp}&target_tp_rank={tp}&target_pp_rank={pp}"


def test_the_layout_is_there_once_every_rank_has_registered(address: str) -> None:
    layout = make_layout(4, 2)
    with pytest.raises(BootstrapError, match=r"not ready \(503\): no prefill rank has registered yet"):
        fetch_topology(address)
    for number in (0, 1, 3):
        register_rank(address, rank(layout, number))
    with pytest.raises(BootstrapError, match="3 of 4 prefill ranks have registered; missing: DP rank 1 attention-TP rank 0"):
        fetch_topology(address)
    register_rank(address, rank(layout, 2))

    topology = fetch_topology(address)

    assert (topology.instance, topology.layout) == ("p0", layout)
    assert [[one.rank_port for one in row] for row in topology.addresses] == [[5000, 5001], [5002, 5003]]


def test_it_speaks_sglangs_routes_and_fields(address: str) -> None:
    sizes = {"attn_tp_size": 1, "attn_cp_size": 1, "attn_dp_size": 1, "pp_size": 1, "system_dp_size": 1}
    ranks = {"attn_tp_rank": 0, "attn_cp_rank": 0, "attn_dp_rank": 0, "pp_rank": 0, "system_dp_rank": 0}
    theirs = {"rank_ip": "10.0.0.1", "rank_port": 7, "page_size": 16, "kv_cache_dtype": "auto", "prefill_http_port": 3}
    ours = {"instance": "p", "model_id": "m", "tp_size": 1, "ep_size": 1, "bytes_per_token": 8, "num_layers": 1}
    body = sizes | ranks | theirs | ours
    assert ask(address, "PUT", "/route", json.dumps(body).encode()) == (200, "OK")

    status, topology = ask(address, "GET", route(-1, -1, -1, -1))
    sglang = {"attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 16, "kv_cache_dtype": "auto"}
    assert status == 200
    assert sglang.items() <= topology.items()
    assert topology["follow_bootstrap_room"] is True
    assert ask(address, "GET", route(0, 0, 0, 0)) == (200, {"rank_ip": "10.0.0.1", "rank_port": 7})
    assert ask(address, "GET", route(1, 0, 0, 0))[0] == 404
    assert ask(address, "GET", "/route?prefill_dp_rank=0")[0] == 400
    assert ask(address, "GET", "/health") == (200, "OK")
    assert ask(address, "GET", "/elsewhere")[0] == 404


def test_a_rank_whose_kv_differs_is_refused_with_both_values(address: str) -> None:
    register_rank(address, rank(make_layout(2), 0))

    with pytest.raises(LayoutMismatchError, match=r"page size differs: the ranks before have 16, this rank has 64"):
        register_rank(address, rank(make_layout(2, page_size=64), 1))
    with pytest.raises(LayoutMismatchError, match=r"KV dtype differs: the ranks before have float32, this rank has bfloat16"):
        register_rank(address, rank(make_layout(2, kv_dtype="bfloat16"), 1))
    with pytest.raises(LayoutMismatchError, match="the ranks before have the layout"):
        register_rank(address, rank(make_layout(4), 1))


def test_what_is_no_registration_is_refused_and_the_server_goes_on(address: str) -> None:
    assert ask(address, "PUT", "/route", b"{}")[0] == 400
    assert ask(address, "PUT", "/route", b"\xff")[0] == 400
    impossible = msgspec.structs.replace(rank(make_layout(2), 0), attn_tp_rank=2)
    with pytest.raises(LayoutMismatchError, match="attention-TP rank 2 of 2: there is no such rank"):
        register_rank(address, impossible)
    register_rank(address, rank(make_layout(), 0))

    assert fetch_topology(address).instance == "p0"


def test_a_restarted_instance_makes_the_old_registrations_void(address: str) -> None:
    for number in range(2):
        register_rank(address, rank(make_layout(2), number, "before"))
    register_rank(address, rank(make_layout(2), 0, "after"))

    with pytest.raises(BootstrapError, match="1 of 2 prefill ranks have registered"):
        fetch_topology(address)
    register_rank(address, rank(make_layout(2), 1, "after"))
    assert fetch_topology(address).instance == "after"


def test_a_server_that_is_not_there_is_named_within_the_deadline() -> None:
    address = f"127.0.0.1:{free_port()}"
    began = time.monotonic()

    with pytest.raises(BootstrapError, match=f"the bootstrap server at {address} can't be reached: .*refused; tried for 0.5 s"):
        register_rank(address, rank(make_layout(), 0), seconds=0.5)

    assert time.monotonic() - began < 2.0


def test_something_else_on_the_port_is_not_taken_for_a_bootstrap_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def greet() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(b"SSH-2.0\r\n")

        stranger = threading.Thread(target=greet)
        stranger.start()
        with pytest.raises(BootstrapError, match=f"the bootstrap server at {address} can't be reached: SSH-2.0"):
            fetch_topology(address)
        stranger.join()
    with pytest.raises(BootstrapError, match="must be host:port, got 'nowhere'"):
        fetch_topology("nowhere")
