"""The whole server, as its users see it: real ranks over gloo, real HTTP, real clients. Oracle: HF transformers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import wait_for
from live_server import LiveServer, free_port, is_alive
from openai import OpenAI
from tiny_models import TinyModel

from moesaic.eplb.load_record import load

DP2 = ("--tp", "2", "--dp", "2", "--enable-dp-attention", "--moe-a2a-backend", "torch", "--max-total-tokens", "2048")


def _generate(client: httpx.Client, prompt: list[int], num_tokens: int, **options: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    answer = client.post("/generate", json={"input_ids": prompt, "sampling_params": sampling, **options})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def _prompts(count: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(4, 500) for _ in range(rng.randrange(1, 40))] for _ in range(count)]


def test_generate_gives_the_oracles_tokens_and_logprobs(server: LiveServer, model: TinyModel) -> None:
    with server.client() as client:
        for prompt in _prompts(3):
            answer = _generate(client, prompt, 6, return_logprob=True, logprob_start_len=0)
            assert answer["output_ids"] == model.greedy(prompt, 6)
            logprobs = [row[0] for row in answer["meta_info"]["input_token_logprobs"]]
            assert logprobs[0] is None
            assert logprobs[1:] == pytest.approx(model.prompt_logprobs(prompt), abs=1e-4)


def test_many_clients_at_once_get_what_they_get_alone(server: LiveServer, model: TinyModel) -> None:
    prompts = _prompts(16)
    with server.client() as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: _generate(client, prompt, 5), prompts))
    assert [answer["output_ids"] for answer in answers] == [model.greedy(prompt, 5) for prompt in prompts]
    assert {answer["meta_info"]["dp_rank"] for answer in answers} == {0, 1}


def test_the_openai_client_whole_and_streamed(server: LiveServer) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    name = client.models.list().data[0].id
    messages: Any = [{"role": "user", "content": "the quick fox"}]
    whole = client.chat.completions.create(model=name, messages=messages, max_tokens=12, temperature=0)
    stream = client.chat.completions.create(
        model=name, messages=messages, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 12
    completion = client.completions.create(model=name, prompt="quick", max_tokens=4, temperature=0, n=2)
    assert len(completion.choices) == 2 and completion.choices[0].text == completion.choices[1].text


def test_disconnects_and_aborts_leave_nothing_running(server: LiveServer) -> None:
    """300 requests, a third of which hang up or are aborted on the way; then every rank's KV is free."""
    rng = random.Random(5)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        prompt = [rng.randrange(4, 500) for _ in range(rng.randrange(1, 60))]
        sampling = {"max_new_tokens": rng.randrange(1, 12), "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "rid": f"r{number}", "stream": True}
        fate = number % 6
        async with client.stream("POST", "/generate", json=body) as answer:
            async for _line in answer.aiter_lines():
                if fate == 0:
                    return  # hang up
                if fate == 1:
                    await client.post("/abort_request", json={"rid": f"r{number}"})

    async def all_of_them() -> None:
        gate = asyncio.Semaphore(32)

        async def gated(client: httpx.AsyncClient, number: int) -> None:
            async with gate:
                await one(client, number)

        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            await asyncio.gather(*(gated(client, number) for number in range(300)))

    asyncio.run(all_of_them())
    wait_for(lambda: server.used_tokens() == 0, 10)


def test_expert_load_is_recorded_over_all_ranks(server: LiveServer, model: TinyModel) -> None:
    with server.client() as client:
        client.post("/flush_cache")
        assert client.post("/start_expert_distribution_record").status_code == 200
        _generate(client, [7] * 10, 5)
        client.post("/stop_expert_distribution_record")
        answer = client.post("/dump_expert_distribution_record").json()
    path = next(message for message in answer["ranks"] if message)
    record = load(path)
    os.unlink(path)
    tokens = 10 + 4  # the last new token is never run
    assert record.logical_count.sum(axis=(0, 2)).tolist() == [tokens * 4] * 2  # top-4, two sparse layers


def test_the_kv_pools_are_as_large_as_the_memory_plan_said(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        info = client.get("/server_info").json()

    plan = info["memory_plan"]
    assert "memory of one rank" in server.output
    assert info["max_total_num_tokens"] == 2 * plan["kv_tokens"] == 2 * 2048
    assert plan["kv_bytes"] == 2048 * plan["kv_bytes_per_token"] and plan["headroom_bytes"] > 0


def test_health_is_red_while_a_rank_is_wedged(server: LiveServer) -> None:
    """A stopped process sends no heartbeats; when it goes on, so does the service."""
    pid = server.rank_pids()[1]
    with server.client() as client:
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_for(lambda: client.get("/health").status_code == 503, 12)
            assert "rank 1" in client.get("/health").text
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: client.get("/health").status_code == 200, 12)
        assert len(_generate(client, [5, 6, 7], 3)["output_ids"]) == 3


def test_a_killed_rank_ends_every_request_and_the_server_names_it(model: TinyModel, tmp_path: Path) -> None:
    with LiveServer(model.folder, tmp_path / "log", *DP2) as server:
        pids = server.rank_pids()
        assert len(pids) == 2
        body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}

        def ask() -> tuple[int, str]:
            answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
            return answer.status_code, answer.text

        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(ask) for _ in range(4)]
            wait_for(lambda: server.used_tokens() > 0, 10)
            os.kill(pids[1], signal.SIGKILL)
            killed = time.monotonic()
            results = [answer.result() for answer in answers]
        assert time.monotonic() - killed < 5
        assert all(status == 503 and "rank 1" in text for status, text in results), results
        assert server.process.wait(10) != 0
        assert "rank 1" in server.output.splitlines()[-1]
        wait_for(lambda: not any(map(is_alive, pids)), 5)


def test_two_nodes_serve_as_one_and_end_together(model: TinyModel, tmp_path: Path) -> None:
    flags = ("--tp", "2", "--dp", "2", "--enable-dp-attention", "--moe-a2a-backend", "torch", "--max-total-tokens", "2048")
    shared = (*flags, "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port(following=4)}")
    second = LiveServer(model.folder, tmp_path / "node1", *shared, "--node-rank", "1", ready="")
    try:
        with LiveServer(model.folder, tmp_path / "node0", *shared, "--node-rank", "0") as first, first.client() as client:
            prompts = _prompts(4)
            answers = [_generate(client, prompt, 5, data_parallel_rank=i % 2) for i, prompt in enumerate(prompts)]
            assert [answer["output_ids"] for answer in answers] == [model.greedy(prompt, 5) for prompt in prompts]
            assert [answer["meta_info"]["dp_rank"] for answer in answers] == [0, 1, 0, 1]
            health = httpx.get(f"{second.url}/health")
            assert (health.status_code, health.json()) == (200, {"node_rank": 1, "ranks": {"1": "running"}, "problem": None})
            assert first.stop() == 0
        assert second.process.wait(10) == 0, second.output[-2000:]
    finally:
        second.stop()


def test_a_damaged_checkpoint_is_refused_by_file_and_tensor(model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in model.folder.iterdir():
        (folder / file.name).symlink_to(file)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.mlp.experts.3.up_proj.weight"]
    index.unlink()
    index.write_text(json.dumps(content))
    server = LiveServer(folder, tmp_path / "log")
    assert server.process.wait(60) != 0
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in server.output
    assert str(folder) in server.output


def test_ctrl_c_stops_cleanly_and_leaves_no_process(model: TinyModel, tmp_path: Path) -> None:
    with LiveServer(model.folder, tmp_path / "log", "--tp", "2", "--dp", "1", "--max-total-tokens", "1024") as server:
        pids = server.rank_pids()
        with server.client() as client:
            assert len(_generate(client, [9, 8, 7], 3)["output_ids"]) == 3
        assert server.stop() == 0
        assert not any(map(is_alive, pids))
