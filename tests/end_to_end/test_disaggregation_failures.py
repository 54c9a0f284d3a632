"""What happens to requests when the other side dies, stalls, or is full: they end with a reason, and everybody else goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import wait_for
from live_server import LiveServer, free_port
from pd_servers import PdPair, greedy, kill, metric, next_room, pd_pair, post, start_prefill
from router_process import pd_router
from tiny_models import TinyModel

PROMPT = [9, 8, 7, 6]


@pytest.fixture(scope="module")
def pair(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PdPair]:
    """A decode server with little memory: 256 tokens."""
    flags = ("--max-total-tokens", "256", "--num-reserved-decode-tokens", "8")
    with pd_pair(model.folder, tmp_path_factory.mktemp("pd"), ("--chunked-prefill-size", "16"), flags) as pair:
        yield pair


def test_more_requests_than_memory_wait_and_are_all_served(pair: PdPair, model: TinyModel) -> None:
    prompts = [[index + 5, *range(50, 90)] for index in range(12)]
    bodies = [{**greedy(prompt, 40), **pair.room()} for prompt in prompts]
    with ThreadPoolExecutor(2 * len(bodies)) as threads:
        prefilled = [threads.submit(post, pair.prefill, body) for body in bodies]
        decoded = [threads.submit(post, pair.decode, body) for body in bodies]
        assert [one.result().status_code for one in prefilled] == [200] * len(bodies)
        assert [one.result().json()["output_ids"] for one in decoded] == [model.greedy(prompt, 40) for prompt in prompts]
    wait_for(lambda: pair.used_tokens() == 0, 20)
    with pair.decode.client() as client:
        retraction = client.get("/server_info").json()["internal_states"][0]["retraction"][0]
    assert 0 < retraction["num_restored_tokens"] <= retraction["num_offloaded_tokens"] and not retraction["num_host_tokens"]
    assert 0 < retraction["copy_us"] < retraction["recompute_us"]
    assert metric(pair.decode, "retracted_restored_tokens_total") == retraction["num_restored_tokens"]


def test_a_dead_prefill_fails_its_requests_and_no_others(pair: PdPair, model: TinyModel, tmp_path: Path) -> None:
    bootstrap_port, port = free_port(), free_port()
    doomed = start_prefill(model.folder, tmp_path / "doomed.log", bootstrap_port, port)
    # Frozen in the middle: it has welcomed the decode rank, and will never send the last page.
    known = {"bootstrap_host": "127.0.0.1", "bootstrap_port": bootstrap_port, "bootstrap_room": next_room()}
    warm = {**greedy(PROMPT, 2), **known}
    thread = threading.Thread(target=post, args=(doomed, warm))
    thread.start()
    assert post(pair.decode, warm).status_code == 200
    thread.join()
    room = next_room()
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(post, pair.decode, {**greedy(PROMPT, 20), **known, "bootstrap_room": room})
        wait_for(lambda: pair.decode.used_tokens() > 0, 10)
        kill(doomed)
        killed_at = time.monotonic()
        first, second = pair.both("/generate", {**greedy(PROMPT, 6), **pair.room()})
        assert (first.status_code, second.json()["output_ids"]) == (200, model.greedy(PROMPT, 6))
        answer = waiting.result()
    assert time.monotonic() - killed_at < 5.0
    assert answer.status_code == 503
    message = answer.json()["error"]["message"]
    for part in (f"room {room}", "in state waiting", f"prefill instance 127.0.0.1:{port}/", "rank 0", "decode instance"):
        assert part in message, message
    wait_for(lambda: pair.used_tokens() == 0, 20)

    returned = start_prefill(model.folder, tmp_path / "returned.log", bootstrap_port, port, chunk=1)
    try:
        again = {**greedy(PROMPT, 6), **known, "bootstrap_room": next_room()}
        with ThreadPoolExecutor(2) as threads:
            prefilled, decoded = threads.submit(post, returned, again), threads.submit(post, pair.decode, again)
            assert (prefilled.result().status_code, decoded.result().status_code) == (200, 200), decoded.result().text
            assert decoded.result().json()["output_ids"] == model.greedy(PROMPT, 6)
        check_killed_between_pages(pair, returned, known)
    finally:
        returned.stop()


def check_killed_between_pages(pair: PdPair, prefill: LiveServer, known: dict[str, Any]) -> None:
    """A prompt computed token by token takes long, and its pages leave one by one: killed half-way, some of them have been read."""
    durations = []
    for kills in (False, True):
        room = next_room()
        body = {**greedy([300 + kills, *range(20, 220)], 4), **known, "bootstrap_room": room}
        with ThreadPoolExecutor(2) as threads:
            begun = time.monotonic()
            prefilling, decoding = threads.submit(post, prefill, body), threads.submit(post, pair.decode, body)
            if kills:
                time.sleep(durations[0] / 2)
                kill(prefill)
                assert prefilling.exception() is not None
            else:
                assert prefilling.result().status_code == 200
            durations.append(time.monotonic() - begun)
            answer = decoding.result()
    assert answer.status_code == 503, answer.text
    message = answer.json()["error"]["message"]
    assert f"room {room}" in message and "in state transferring" in message, message
    wait_for(lambda: pair.decode.used_tokens() == 0, 20)


@pytest.mark.whole
def test_the_router_goes_on_with_the_prefill_that_is_left(pair: PdPair, model: TinyModel, tmp_path: Path) -> None:
    bootstrap_port = free_port()
    doomed = start_prefill(model.folder, tmp_path / "doomed.log", bootstrap_port, free_port())
    flags = ("--prefill-policy", "round_robin", "--decode-policy", "round_robin")
    prefill = [(pair.prefill, pair.bootstrap_port), (doomed, bootstrap_port)]
    with pd_router(prefill, [pair.decode], tmp_path / "router.log", *flags) as client:
        for index in range(4):
            assert client.post("/generate", json=greedy([index, *PROMPT], 3)).status_code == 200
        kill(doomed)
        for index in range(3):
            answer = client.post("/generate", json=greedy([index, *PROMPT], 6))
            assert answer.status_code == 200, answer.text
            assert answer.json()["output_ids"] == model.greedy([index, *PROMPT], 6)


def test_a_dead_decode_frees_prefill(pair: PdPair, model: TinyModel, tmp_path: Path) -> None:
    doomed = LiveServer(
        model.folder, tmp_path / "log", "--disaggregation-mode", "decode", "--max-total-tokens", "64", "--context-length", "64"
    )
    doomed.wait_ready()
    # 60 of 64 tokens are taken by the first, so the second waits for pages while prefill waits for it.
    bodies = [{**greedy(PROMPT, 55), **pair.room()} for _ in range(2)]
    with ThreadPoolExecutor(4) as threads:
        decoding = [threads.submit(httpx.post, f"{doomed.url}/generate", json=body, timeout=30) for body in bodies]
        prefilling = [threads.submit(post, pair.prefill, body) for body in bodies]
        wait_for(lambda: doomed.holds(running=1, waiting=1) or all(one.done() for one in prefilling), 10)
        kill(doomed)
        codes = [one.result().status_code for one in prefilling]
        failed = [one.exception() is not None for one in decoding]
    assert any(failed) and all(code in (200, 503, 504) for code in codes), codes
    wait_for(lambda: pair.prefill.used_tokens() == 0, 20)
    first, second = pair.both("/generate", {**greedy(PROMPT, 6), **pair.room()})
    assert (first.status_code, second.json()["output_ids"]) == (200, model.greedy(PROMPT, 6))
