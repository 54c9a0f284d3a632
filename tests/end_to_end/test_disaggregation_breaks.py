"""The rest of what may break between whole servers: reads under way, frames, deadlines, addresses, memory. By hand: `-m whole`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from frame_proxy import DAMAGES, FrameProxy
from http_server import wait_for
from live_server import LiveServer, free_port
from pd_servers import PdPair, frozen, greedy, kill, metric, next_room, pd_pair, post, start_prefill
from router_process import pd_router
from tiny_models import TinyModel

from moesaic.launch.disaggregation.backends import missing_reason
from moesaic.launch.disaggregation.bootstrap import BootstrapServer, registration
from moesaic.launch.disaggregation.bootstrap_client import fetch_topology, register_rank

pytestmark = pytest.mark.whole

PROMPT = list(range(40, 140))
SHORT = ("--disaggregation-timeout", "3")
DP2_EP2 = ("--tp", "2", "--dp", "2", "--enable-dp-attention", "--moe-a2a-backend", "torch")
TRANSFERRING_S = 1.5
"""What --disaggregation-timeout 3 leaves a transfer."""


@pytest.fixture(scope="module")
def pair(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PdPair]:
    with pd_pair(model.folder, tmp_path_factory.mktemp("pd"), SHORT, (*SHORT, "--disaggregation-checksum")) as pair:
        yield pair


@pytest.fixture(autouse=True)
def others_go_on_and_nothing_leaks(pair: PdPair, model: TinyModel) -> Iterator[None]:
    """After each test, whatever has broken."""
    yield
    check_served(pair, model)
    wait_for(lambda: pair.used_tokens() == 0, 20)
    for server in (pair.prefill, pair.decode):
        with server.client() as client:
            assert client.get("/health").status_code == 200


def check_served(pair: PdPair, model: TinyModel, **fields: Any) -> None:
    prefilled, decoded = pair.both("/generate", {**greedy(PROMPT, 5), **pair.room(), **fields})
    assert (prefilled.status_code, decoded.status_code) == (200, 200), (prefilled.text, decoded.text)
    assert decoded.json()["output_ids"] == model.greedy(PROMPT, 5)


@contextmanager
def reading_from_a_frozen_prefill(
    prefill: LiveServer, decode: LiveServer, fields: dict[str, Any]
) -> Iterator[tuple[Future[httpx.Response], Future[httpx.Response]]]:
    """All pages have been announced, decode has begun to read them, and prefill's rank does nothing any more (until the end)."""
    body = {**greedy(PROMPT, 5), **fields}
    with ThreadPoolExecutor(2) as threads, ExitStack() as stack:
        decoding = threads.submit(post, decode, body)
        wait_for(lambda: metric(decode, "num_decode_transfer_queue_reqs") == 1, 10)
        time.sleep(0.2)  # prefill hears of it
        with frozen(decode):
            prefilling = threads.submit(post, prefill, body)
            wait_for(lambda: metric(prefill, "num_prefill_inflight_queue_reqs") == 1, 10)
            time.sleep(0.2)  # the announcements are out
            stack.enter_context(frozen(prefill))
        time.sleep(0.3)  # decode has heard them
        yield prefilling, decoding


def message_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(missing_reason(name) is not None, reason=str(missing_reason(name))))
        for name in ("tcp", "nixl")
    ],
)
def test_a_prefill_killed_while_decode_reads_from_it(backend: str, model: TinyModel, tmp_path: Path) -> None:
    flags = ("--disaggregation-transfer-backend", backend)
    with pd_pair(model.folder, tmp_path, flags, flags) as own:
        check_served(own, model)
        fields = own.room()
        with reading_from_a_frozen_prefill(own.prefill, own.decode, fields) as (prefilling, decoding):
            kill(own.prefill)
            killed_at = time.monotonic()
            answer = decoding.result(10)
            assert time.monotonic() - killed_at < 5.0
            assert prefilling.exception() is not None
        assert answer.status_code == 503, answer.text
        for part in (
            f"room {fields['bootstrap_room']}",
            "in state transferring",
            f"prefill instance 127.0.0.1:{own.prefill.port}/",
        ):
            assert part in message_of(answer), answer.text
        wait_for(lambda: own.decode.used_tokens() == 0, 20)
        returned = start_prefill(model.folder, tmp_path / "returned", own.bootstrap_port, own.prefill.port, *flags)
        try:
            check_served(PdPair(returned, own.decode, own.bootstrap_port), model)
        finally:
            returned.stop()


def test_a_transfer_slower_than_its_deadline(pair: PdPair) -> None:
    fields = pair.room()
    with reading_from_a_frozen_prefill(pair.prefill, pair.decode, fields) as (prefilling, decoding):
        answer = decoding.result(TRANSFERRING_S + 2.0)
        assert answer.status_code == 504, answer.text
        message = message_of(answer)
        for part in (f"room {fields['bootstrap_room']}", "in state transferring: stuck for 1.5 s", "reads from prefill instance"):
            assert part in message, message
    assert prefilling.result().status_code in (503, 504)


def test_frames_that_come_twice_cut_off_or_changed(model: TinyModel, tmp_path: Path) -> None:
    """Between decode and prefill's rank 0 there is a device that damages frames; rank 1 is reached without it."""
    words = {"repeat": "came again, expected frame", "cut": "in the middle of a frame", "change": "arrived changed"}
    with (
        pd_pair(model.folder, tmp_path, (*SHORT, *DP2_EP2), SHORT) as own,
        damaging_device(own.bootstrap_port) as (proxy, port),
        ThreadPoolExecutor(1) as threads,
    ):
        through = PdPair(own.prefill, own.decode, port)
        check_served(through, model, bootstrap_room=2 * next_room())
        for damage in DAMAGES:
            proxy.damage = damage
            room = 2 * next_room()
            other = threads.submit(check_served, through, model, bootstrap_room=2 * next_room() + 1)
            answers = through.both("/generate", {**greedy(PROMPT, 5), **through.room(room)})
            other.result()
            for answer in answers:
                assert answer.status_code == 503, (damage, answer.text)
                assert f"room {room}" in message_of(answer)
            assert words[damage] in message_of(answers[1]), answers[1].text
            check_served(through, model, bootstrap_room=2 * next_room())
        wait_for(lambda: own.used_tokens() == 0, 20)


@contextmanager
def damaging_device(bootstrap_port: int) -> Iterator[tuple[FrameProxy, int]]:
    """In front of prefill's rank 0, and the port of a bootstrap server that sends decode there."""
    topology = fetch_topology(f"127.0.0.1:{bootstrap_port}")
    addresses = [(rank.rank_ip, rank.rank_port) for group in topology.addresses for rank in group]
    with FrameProxy(addresses[0]) as proxy, BootstrapServer(port=0) as bootstrap:
        for dp_rank, address in enumerate([proxy.address, *addresses[1:]]):
            place = registration(topology.layout, instance=topology.instance, dp_rank=dp_rank, attn_tp_rank=0, address=address)
            register_rank(f"127.0.0.1:{bootstrap.address[1]}", place)
        yield proxy, bootstrap.address[1]


def test_a_bootstrap_server_that_is_not_there(pair: PdPair) -> None:
    port = free_port()
    began = time.monotonic()
    prefilled, decoded = pair.both("/generate", {**greedy(PROMPT, 5), **pair.room(), "bootstrap_port": port})
    assert time.monotonic() - began < 5.0
    assert decoded.status_code == 503 and prefilled.status_code == 504, (decoded.text, prefilled.text)
    assert f"in state bootstrapping: the bootstrap server at 127.0.0.1:{port} can't be reached" in message_of(decoded)
    assert "0 decode ranks have opened it" in message_of(prefilled)


def test_decode_without_memory_for_a_minute(model: TinyModel, tmp_path: Path) -> None:
    """One request at a time fits; 120 come at once. All wait their turn, none fails, and health says that all is well meanwhile."""
    prompts = [[index + 5, *range(50, 90)] for index in range(120)]
    with pd_pair(model.folder, tmp_path, (), ("--max-total-tokens", "448", "--num-reserved-decode-tokens", "300")) as own:
        bodies = [{**greedy(prompt, 400), **own.room()} for prompt in prompts]
        began = time.monotonic()
        with ThreadPoolExecutor(2 * len(bodies)) as threads:
            prefilled = [threads.submit(patient_post, own.prefill, body) for body in bodies]
            decoded = [threads.submit(patient_post, own.decode, body) for body in bodies]
            wait_for(lambda: metric(own.decode, "num_decode_prealloc_queue_reqs") > 80, 20)
            while not all(one.done() for one in decoded):
                for server in (own.prefill, own.decode):
                    with server.client() as client:
                        assert client.get("/health").status_code == 200
                time.sleep(1)
        print(f"memory was short for {time.monotonic() - began:.0f} s")
        assert [one.result().status_code for one in prefilled + decoded] == [200] * 2 * len(bodies)
        for index in (0, 60, 119):
            assert decoded[index].result().json()["output_ids"] == model.greedy(prompts[index], 400)
        wait_for(lambda: own.used_tokens() == 0, 20)


def patient_post(server: LiveServer, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/generate", json=body, timeout=280)


def test_a_decode_that_is_killed_and_comes_back_is_used_again(pair: PdPair, model: TinyModel, tmp_path: Path) -> None:
    port = free_port()
    flags = ("--disaggregation-mode", "decode", "--max-total-tokens", "2048", "--enable-metrics", *SHORT)

    def start(name: str) -> LiveServer:
        server = LiveServer(model.folder, tmp_path / name, *flags, port=port)
        server.wait_ready()
        return server

    doomed = start("first")
    flags_of_router = ("--decode-policy", "round_robin", "--prefill-policy", "round_robin", "--health-check-interval-secs", "1")
    workers = [(pair.prefill, pair.bootstrap_port)]
    with pd_router(workers, [pair.decode, doomed], tmp_path / "router", *flags_of_router) as client:
        ask = {**greedy(PROMPT, 4)}
        for _ in range(4):
            assert client.post("/generate", json=ask).json()["output_ids"] == model.greedy(PROMPT, 4)
        kill(doomed)
        for _ in range(6):
            answer = client.post("/generate", json=ask)
            assert answer.status_code == 200 and answer.json()["output_ids"] == model.greedy(PROMPT, 4), answer.text
        returned = start("second")
        try:

            def is_used() -> bool:
                assert client.post("/generate", json=ask).status_code == 200
                return metric(returned, "num_requests_total") > 0

            wait_for(is_used, 90)
        finally:
            returned.stop()
