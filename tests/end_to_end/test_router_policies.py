"""What sglang-router does with prefill and decode servers, policy by policy; README has the table. By hand: `-m whole`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from http_server import wait_for
from live_server import LiveServer, free_port
from pd_servers import PdPair, greedy, kill, metric, pd_pair, start_prefill
from router_process import pd_router, router
from tiny_models import TinyModel

pytestmark = pytest.mark.whole

PROMPT = [9, 8, 7, 6]
STORIES = ("the quick brown fox jumps over the lazy dog, ", "a hundred bottles of beer stand on the old wall, ")


@dataclass(frozen=True)
class Fleet:
    """Two prefill and two decode servers."""

    pairs: tuple[PdPair, PdPair]

    @property
    def servers(self) -> list[LiveServer]:
        return [*(pair.prefill for pair in self.pairs), *(pair.decode for pair in self.pairs)]

    def counts(self) -> list[int]:
        """Requests served so far: prefill 0 and 1, decode 0 and 1."""
        wait_for(lambda: sum(pair.used_tokens() for pair in self.pairs) == 0, 20)
        return [num_served(server) for server in self.servers]

    @contextmanager
    def router(self, log: Path, *flags: str, more: tuple[tuple[LiveServer, int], ...] = ()) -> Iterator[httpx.Client]:
        """In front of all, and of `more` prefill servers."""
        prefill = [(pair.prefill, pair.bootstrap_port) for pair in self.pairs]
        with pd_router([*prefill, *more], [pair.decode for pair in self.pairs], log, *flags) as client:
            yield client


@pytest.fixture(scope="module")
def fleet(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
        first, second = (stack.enter_context(pd_pair(model.folder, folder, tokens=4096)) for folder in folders)
        yield Fleet((first, second))


def num_served(server: LiveServer) -> int:
    return round(metric(server, "num_requests_total"))


def grown(fleet: Fleet, before: list[int]) -> list[int]:
    return [after - start for after, start in zip(fleet.counts(), before, strict=True)]


def ask(client: httpx.Client, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = client.post("/generate", json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def told(story: str, turn: int) -> dict[str, Any]:
    """A conversation's request: it begins as those before."""
    return {"text": 4 * story + "again " * turn, "sampling_params": {"temperature": 0, "max_new_tokens": 2}}


def test_round_robin(fleet: Fleet, tmp_path: Path) -> None:
    with fleet.router(tmp_path / "log", "--policy", "round_robin") as client:
        before = fleet.counts()
        for _ in range(8):
            ask(client, greedy(PROMPT, 3))
        assert grown(fleet, before) == [4, 4, 4, 4]


def test_power_of_two_leaves_a_busy_decode_server_alone(fleet: Fleet, tmp_path: Path) -> None:
    flags = ("--prefill-policy", "round_robin", "--decode-policy", "power_of_two")
    busy, free = fleet.pairs
    stop = Event()

    def keep_busy() -> None:
        while not stop.is_set():
            busy.both("/generate", {**greedy(PROMPT, 300), **busy.room()})

    with fleet.router(tmp_path / "log", *flags) as client, ThreadPoolExecutor(4) as threads:
        running = [threads.submit(keep_busy) for _ in range(4)]
        try:
            time.sleep(2.5)  # the router asks for the loads every second
            before = num_served(free.decode)
            for _ in range(6):
                ask(client, greedy(PROMPT, 2))
            assert num_served(free.decode) - before >= 5
        finally:
            stop.set()
        for one in running:
            one.result()


def test_cache_aware_in_front_of_whole_servers(server: LiveServer, model: TinyModel, tmp_path: Path) -> None:
    """A conversation stays where its beginning is cached."""
    with (
        LiveServer(model.folder, tmp_path / "second", "--max-total-tokens", "2048") as second,
        router([server, second], tmp_path / "log", "--policy", "cache_aware") as client,
    ):
        for story in STORIES:
            cached = [ask(client, told(story, turn))["meta_info"]["cached_tokens"] for turn in range(6)]
            assert cached[0] == 0 and all(count > 30 for count in cached[1:]), cached


def test_cache_aware_in_front_of_prefill_servers_places_at_random(fleet: Fleet, tmp_path: Path) -> None:
    """A fault of 0.3.2 (sgl-project/sglang#25184), told in README. With a version that is mended this fails, and README changes."""
    with fleet.router(tmp_path / "log", "--prefill-policy", "cache_aware", "--decode-policy", "round_robin") as client:
        before = fleet.counts()
        for turn in range(24):
            ask(client, told(STORIES[0], turn % 6))
        assert min(grown(fleet, before)[:2]) > 0


def test_manual_keeps_a_session_where_it_is(fleet: Fleet, tmp_path: Path) -> None:
    with fleet.router(tmp_path / "log", "--policy", "manual", "--assignment-mode", "min_group") as client:
        places = []
        for session in range(4):
            before = fleet.counts()
            for _ in range(3):
                ask(client, greedy(PROMPT, 2), X_SMG_Routing_Key=f"session {session}")
            places.append(tuple(grown(fleet, before)))
            assert sorted(places[-1]) == [0, 0, 3, 3]
        assert len(set(places)) > 1, "sessions are spread"


def test_rate_limit_and_queue(fleet: Fleet, tmp_path: Path) -> None:
    def codes(num_tokens: int, *flags: str) -> Counter[int]:
        limit = ("--max-concurrent-requests", "2", "--policy", "round_robin")
        with fleet.router(tmp_path / "log", *limit, *flags) as client, ThreadPoolExecutor(8) as threads:
            answers = [threads.submit(client.post, "/generate", json=greedy(PROMPT, num_tokens)) for _ in range(8)]
            return Counter(one.result().status_code for one in answers)

    assert codes(150, "--queue-size", "0") == {200: 2, 429: 6}
    assert codes(3, "--queue-size", "10") == {200: 8}
    # A place is waited for as long as the bucket needs to refill by one: 1 / rate seconds, whatever --queue-timeout-secs says.
    slow = codes(300, "--queue-size", "10", "--rate-limit-tokens-per-second", "20")
    assert set(slow) == {200, 408}, slow


def test_retries_and_the_breaker(fleet: Fleet, model: TinyModel, tmp_path: Path) -> None:
    bootstrap_port, port = free_port(), free_port()
    doomed = start_prefill(model.folder, tmp_path / "doomed", bootstrap_port, port, "--enable-metrics")
    more = ((doomed, bootstrap_port),)
    common = ("--policy", "round_robin", "--health-check-interval-secs", "600", "--health-failure-threshold", "1000")
    ports = [str(free_port()) for _ in range(2)]
    breaker = ("--disable-retries", "--cb-failure-threshold", "2", "--cb-timeout-duration-secs", "5", "--cb-success-threshold", "1")
    with (
        fleet.router(tmp_path / "a", *common, "--disable-circuit-breaker", "--prometheus-port", ports[0], more=more) as retrying,
        fleet.router(tmp_path / "b", *common, *breaker, "--prometheus-port", ports[1], more=more) as breaking,
    ):
        kill(doomed)
        for _ in range(6):
            ask(retrying, greedy(PROMPT, 2))
        assert router_metric(ports[0], "smg_worker_retries_total") >= 2

        codes = [breaking.post("/generate", json=greedy(PROMPT, 2)).status_code for _ in range(16)]
        assert sum(code != 200 for code in codes) == 2, "two failures open the breaker, and nothing goes there any more"
        returned = start_prefill(model.folder, tmp_path / "returned", bootstrap_port, port, "--enable-metrics")
        try:
            time.sleep(5)

            def is_used() -> bool:
                ask(breaking, greedy(PROMPT, 2))
                return num_served(returned) > 0

            wait_for(is_used, 20)
        finally:
            returned.stop()


def router_metric(port: str, name: str) -> float:
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
