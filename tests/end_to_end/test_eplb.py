"""Expert rebalancing as its users see it: flags, a rebalance under load, health, metrics, refusals."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from http_server import wait_for
from live_server import LiveServer
from tiny_models import TinyModel

DP2 = ("--tp", "2", "--dp", "2", "--enable-dp-attention", "--moe-a2a-backend", "torch", "--max-total-tokens", "2048")
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def moving(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Two ranks that rebalance every 20 forwards, with four redundant slots a layer."""
    flags = ("--enable-eplb", "--ep-num-redundant-experts", "4", "--eplb-rebalance-num-iterations", "20")
    with LiveServer(model.folder, tmp_path_factory.mktemp("eplb") / "log", *DP2, *flags) as running:
        yield running


def _generate(client: httpx.Client, prompt: list[int]) -> list[int]:
    sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
    answer = client.post("/generate", json={"input_ids": prompt, "sampling_params": sampling})
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["output_ids"]
    return tokens


def test_clients_get_the_oracles_tokens_while_experts_move(moving: LiveServer, model: TinyModel) -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(4, 500) for _ in range(rng.randrange(1, 20))] for _ in range(12)]
    with moving.client() as client, ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda prompt: _generate(client, prompt), prompts))
        assert answers == [model.greedy(prompt, NUM_TOKENS) for prompt in prompts]

        def state() -> dict[str, object]:
            rebalance: dict[str, object] = client.get("/server_info").json()["internal_states"][0]["rebalance"]
            return rebalance

        wait_for(lambda: state()["committed_cycles"], 10)
        assert state()["last_cause"] == ""
        assert client.get("/health").json() == {"status": "ok"}
        metrics = client.get("/metrics").text
    assert 'moesaic:eplb_balancedness{forward_mode="all",model_name=' in metrics
    assert 'moesaic:eplb_cycles_total{model_name="' in metrics
    assert "expert placement" in moving.output
    assert "20 slots a layer (4 redundant)" in moving.output


def test_a_rebalance_can_be_asked_for(moving: LiveServer) -> None:
    with moving.client() as client:
        wait_for(lambda: client.post("/rebalance_experts").status_code == 200, 10)


def test_a_server_whose_experts_do_not_move_says_so(server: LiveServer) -> None:
    with server.client() as client:
        answer = client.post("/rebalance_experts")
    assert answer.status_code == 400
    assert "--enable-eplb" in answer.text
