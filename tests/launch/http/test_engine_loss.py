"""What clients see when ranks die, fall silent or hang; and what ranks see when clients leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from http_server import HttpServer, wait_for

from moesaic.launch.engine.messages import AbortRequest, Control, GenerateRequest, RankError, Wake

LONG: dict[str, Any] = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 400}}


@pytest.fixture(scope="module")
def group(model_path: Path) -> Iterator[HttpServer]:
    """Two ranks of one DP group."""
    with HttpServer(model_path, attn_tp_size=2) as server:
        slow(server)
        yield server


def slow(server: HttpServer, seconds: float = 0.02) -> None:
    for rank in server.ranks:
        rank.step_seconds = seconds


def report_error(server: HttpServer) -> None:
    server.ranks[1].error = RankError(rank=1, message="rank 1: out of memory in 'forward'", traceback="...")


def fall_silent(server: HttpServer) -> None:
    server.ranks[1].silent = True


def launcher_says_so(server: HttpServer) -> None:
    server.client.fail("rank 1 was killed by signal 9 in 'forward'")


def hang(server: HttpServer) -> None:
    server.ranks[1].operation, server.ranks[1].operation_seconds = "all_to_all", 500.0


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (report_error, "out of memory in 'forward'"),
        (launcher_says_so, "signal 9"),
        (fall_silent, "no heartbeat"),
        (hang, "all_to_all"),
    ],
)
def test_every_client_gets_an_error_that_names_the_rank(
    model_path: Path, happens: Callable[[HttpServer], None], words: str
) -> None:
    # Long enough that nine clients starting at once on a slow machine don't look like a rank that has fallen silent.
    with HttpServer(model_path, dp_size=2, heartbeat_deadline=1.5, drain_seconds=0.1) as server:
        slow(server)
        begun = threading.Barrier(9)

        def whole(_index: int) -> tuple[int, str]:
            begun.wait()
            answer = httpx.post(f"{server.url}/generate", json=LONG, timeout=20)
            return answer.status_code, answer.text

        def streamed(_index: int) -> tuple[int, str]:
            begun.wait()
            with httpx.stream("POST", f"{server.url}/generate", json={**LONG, "stream": True}, timeout=20) as answer:
                text = answer.read().decode()
            if answer.status_code != 200:  # it came before the first token
                return answer.status_code, text
            assert text.endswith("data: [DONE]\n\n")
            return 503, text[text.index('{"error"') :]

        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(task, index) for index in range(4) for task in (whole, streamed)]
            begun.wait()
            wait_for(lambda: sum(rank.num_running for rank in server.ranks) == 8)
            happened = time.monotonic()
            happens(server)
            for status, text in (answer.result(10) for answer in answers):
                assert status == 503
                assert words in text
                assert "rank 1" in text
        assert time.monotonic() - happened < 3


def test_a_rank_that_comes_back_is_served_again(model_path: Path) -> None:
    with HttpServer(model_path, dp_size=2, heartbeat_deadline=0.5) as server:
        server.ranks[1].silent = True
        wait_for(lambda: server.http.get("/health").status_code == 503)
        answer = server.post("/generate", LONG)
        assert answer.status_code == 503
        assert "rank 1" in answer.json()["error"]["message"]
        assert server.http.get("/ready").status_code == 503
        assert server.http.get("/health_generate").status_code == 503
        server.ranks[1].silent = False
        wait_for(lambda: server.http.get("/health").status_code == 200)
        assert server.generate(**LONG)["meta_info"]["completion_tokens"] == 400


def test_the_server_ends_with_the_reason(model_path: Path) -> None:
    with HttpServer(model_path) as server:
        server.client.fail("rank 0 exited with code 1")
        wait_for(lambda: server.failure is not None)
        assert server.failure == "rank 0 exited with code 1"


def test_health_generate_has_a_deadline(model_path: Path) -> None:
    with HttpServer(model_path, health_generate_deadline=0.2) as server:
        assert server.http.get("/health_generate").status_code == 200
        server.ranks[0].paused = True
        assert server.http.get("/health_generate").status_code == 503
        wait_for(server.ranks[0].aborts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_a_client_that_leaves_aborts_its_sequences(group: HttpServer, path: str, stream: bool, paused: bool) -> None:
    """Whether tokens are flowing or the request still waits, and on every rank of the group."""
    before = [len(rank.aborts()) for rank in group.ranks]
    for rank in group.ranks:
        rank.paused = paused
    body = {**LONG, "stream": stream, "messages": [{"role": "user", "content": "hi"}], "n": 2, "ignore_eos": True}
    with httpx.Client(timeout=httpx.Timeout(10, read=0.2)) as client, pytest.raises(httpx.ReadTimeout):
        if stream and not paused:
            with client.stream("POST", group.url + path, json=body) as answer:
                next(answer.iter_bytes())
                raise httpx.ReadTimeout("enough")
        client.post(group.url + path, json=body)
    wanted = 1 if path == "/generate" else 2
    wait_for(lambda: [len(rank.aborts()) for rank in group.ranks] == [count + wanted for count in before])
    assert all(rank.num_running == 0 for rank in group.ranks)


def test_an_openai_stream_that_is_closed_aborts(server: HttpServer) -> None:
    slow(server, 0.01)
    before = sum(len(rank.aborts()) for rank in server.ranks)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.completions.create(model="echo", prompt=[5, 6], max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
    wait_for(lambda: sum(len(rank.aborts()) for rank in server.ranks) > before)
    wait_for(lambda: all(rank.num_running == 0 for rank in server.ranks))
    slow(server, 0.0)


def test_abort_request_ends_it_with_abort(server: HttpServer) -> None:
    slow(server)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(server.generate, **LONG, rid=name) for name in ("a", "b", "b")]
        wait_for(lambda: sum(rank.num_running for rank in server.ranks) == 3)
        assert server.post("/abort_request", {"rid": "b"}).json() == {"aborted": 2}
        assert answers[1].result()["meta_info"]["finish_reason"]["type"] == "abort"
        assert answers[2].result()["meta_info"]["finish_reason"]["type"] == "abort"
        assert server.post("/abort_request", {"abort_all": True}).json() == {"aborted": 1}
        assert answers[0].result()["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.post("/abort_request", {"rid": "gone"}).json() == {"aborted": 0}
    slow(server, 0.0)


def test_a_batch_is_aborted_by_its_name(server: HttpServer) -> None:
    slow(server)
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(server.generate, **{**LONG, "input_ids": [[5], [6]]}, rid="batch")
        wait_for(lambda: sum(rank.num_running for rank in server.ranks) == 2)
        assert server.post("/abort_request", {"rid": "bat"}).json() == {"aborted": 0}
        assert server.post("/abort_request", {"rid": "batch"}).json() == {"aborted": 2}
        assert [answer["meta_info"]["finish_reason"]["type"] for answer in batch.result()] == ["abort", "abort"]
    slow(server, 0.0)


def test_ranks_of_a_group_see_one_stream_and_the_others_wake(model_path: Path) -> None:
    with HttpServer(model_path, dp_size=2, attn_tp_size=2) as server:
        for index in range(6):
            server.generate(input_ids=[index], sampling_params={"max_new_tokens": 2, "stop": "\x00"})
        server.generate(text="hi", sampling_params={"max_new_tokens": 50, "stop": "h"})
        server.post("/flush_cache", {})
        for first, second in ((0, 1), (2, 3)):
            wait_for(lambda a=first, b=second: len(server.ranks[a].received) == len(server.ranks[b].received))
            assert server.ranks[first].received == server.ranks[second].received
        kinds = {kind: [m for m in server.ranks[0].received if isinstance(m, kind)] for kind in (GenerateRequest, Wake)}
        assert len(kinds[GenerateRequest]) + len(kinds[Wake]) == 7
        assert any(isinstance(message, Control) for message in server.ranks[3].received)
        aborts = [message for rank in server.ranks for message in rank.received if isinstance(message, AbortRequest)]
        assert len(aborts) == 2
        assert all(abort.finish for abort in aborts)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_step_is_an_error_that_says_why_and_the_next_request_runs(model_path: Path, stream: bool) -> None:
    message = "rank 1: operation gate of layer 3, micro-batch 0: boom"
    with HttpServer(model_path) as server:
        slow(server)
        server.ranks[0].paused = True
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.post, "/generate", {**LONG, "stream": stream})
            wait_for(lambda: server.ranks[0].num_running)
            server.ranks[0].failure = message
            server.ranks[0].paused = False
            answer = waiting.result(10)
        assert answer.status_code == 500
        assert answer.json()["error"] == {"message": message, "type": "internal_error", "param": None, "code": "step_failed"}
        assert server.http.get("/health").status_code == 200
        assert server.generate(input_ids=[5, 6], sampling_params={"max_new_tokens": 2})["output_ids"] == [5, 6]
