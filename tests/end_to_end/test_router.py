"""The real sglang-router in front of two real servers: every policy, tokens still the oracle's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import wait_for
from live_server import LiveServer
from router_process import router
from tiny_models import TinyModel

PROMPTS = [[9, 8, 7, 6], [11] * 20, [11] * 20 + [12], [40, 41], [9, 8, 7], [300, 200, 100, 50, 25]]


@pytest.fixture(scope="module")
def second(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    flags = ("--tp", "2", "--dp", "2", "--enable-dp-attention", "--ep", "2", "--max-total-tokens", "2048")
    with LiveServer(model.folder, tmp_path_factory.mktemp("second") / "log", *flags) as running:
        yield running


@pytest.mark.parametrize(
    "flags", [("round_robin",), ("cache_aware",), ("power_of_two",), ("round_robin", "--dp-aware")], ids="".join
)
def test_policies(flags: tuple[str, ...], server: LiveServer, second: LiveServer, model: TinyModel, tmp_path: Path) -> None:
    workers = [server, second]
    with router(workers, tmp_path / "log", "--policy", *flags) as client:
        if "--dp-aware" in flags:
            wait_for(lambda: len(client.get("/workers").json()["workers"]) == 4, 20)
        for prompt in PROMPTS:
            body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}}
            assert client.post("/generate", json=body).json()["output_ids"] == model.greedy(prompt, 4)
        chat = {"model": str(model.folder), "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=chat) as answer:
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]" and all(json.loads(event) for event in events[:-1])
