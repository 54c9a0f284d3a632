"""sglang-router 0.3.2, the real one, in front of two servers: registration, policies, --dp-aware, streams, aborts.

Its Prometheus exporter and its log go to free ports and to a file; each policy starts its own router process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import HttpServer, wait_for
from router_process import router

pytest.importorskip("sglang_router", reason="sglang-router is not installed (extra: router)")

POLICIES = ["round_robin", "cache_aware", "power_of_two"]


@pytest.fixture(scope="module")
def workers(model_path: Path) -> Iterator[list[HttpServer]]:
    with HttpServer(model_path, dp_size=2) as first, HttpServer(model_path, dp_size=2) as second:
        yield [first, second]


def _counts(workers: list[HttpServer]) -> list[int]:
    return [sum(len(rank.generates()) for rank in worker.ranks) for worker in workers]


def _stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[str]:
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]


def _ask_everything(client: httpx.Client) -> None:
    """Every API once, whole and streamed."""
    native = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    chat = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50}
    text = {"model": "echo", "prompt": "fox", "max_tokens": 5}
    assert client.post("/generate", json=native).json()["output_ids"] == [5, 6, 7, 5]
    assert client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == "<|user|>hi"
    assert client.post("/v1/completions", json=text).json()["choices"][0]["finish_reason"] == "length"
    for path, body in (("/generate", native), ("/v1/chat/completions", chat), ("/v1/completions", text)):
        events = _stream(client, path, body)
        assert events[-1] == "[DONE]"
        assert all(json.loads(event) for event in events[:-1])


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(workers: list[HttpServer], tmp_path: Path, policy: str) -> None:
    with router(workers, tmp_path / "log", "--policy", policy) as client:
        before = _counts(workers)
        _ask_everything(client)
        for index in range(6):
            body = {"text": f"{index} is a prompt", "sampling_params": {"max_new_tokens": 2}}
            assert client.post("/generate", json=body).status_code == 200
        grown = [after - start for after, start in zip(_counts(workers), before, strict=True)]
        assert sum(grown) == 12
        if policy == "round_robin":
            assert grown == [6, 6]


def test_dp_aware_pins_every_request_to_a_dp_rank(workers: list[HttpServer], tmp_path: Path) -> None:
    with router(workers, tmp_path / "log", "--policy", "round_robin", "--dp-aware") as client:
        wait_for(lambda: len(client.get("/workers").json()["workers"]) == 4, 20)
        ranks = [rank for worker in workers for rank in worker.ranks]
        before = [len(rank.generates()) for rank in ranks]
        for index in range(8):
            body = {"input_ids": [index + 3], "sampling_params": {"max_new_tokens": 2}}
            assert client.post("/generate", json=body).status_code == 200
        assert [len(rank.generates()) - start for rank, start in zip(ranks, before, strict=True)] == [2, 2, 2, 2]
        _ask_everything(client)


def test_refusals_come_through_and_a_client_that_leaves_is_noticed(workers: list[HttpServer], tmp_path: Path) -> None:
    with router(workers, tmp_path / "log", "--policy", "round_robin") as client:
        answer = client.post("/generate", json={"input_ids": [5], "sampling_params": {"temperature": -1}})
        assert answer.status_code == 400
        ranks = [rank for worker in workers for rank in worker.ranks]
        for rank in ranks:
            rank.step_seconds = 0.02
        before = sum(len(rank.aborts()) for rank in ranks)
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 400}, "stream": True}
        with client.stream("POST", "/generate", json=body) as streamed:
            next(streamed.iter_bytes())
        wait_for(lambda: sum(len(rank.aborts()) for rank in ranks) > before)
        for rank in ranks:
            rank.step_seconds = 0.0
