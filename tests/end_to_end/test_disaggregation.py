"""Prefill and decode on servers of their own: the tokens are those of one server, whatever the layouts, and nothing leaks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import wait_for
from live_server import LiveServer
from pd_servers import PdPair, next_room, pd_pair
from router_process import pd_router
from tiny_models import TinyModel

from moesaic.launch.disaggregation.backends import missing_reason

PROMPTS = [[9, 8, 7, 6], [11] * 20, list(range(40, 110)), [300, 200, 100, 50, 25], [*range(40, 110), 7, 8, 9]]
TORCH_EP = ("--moe-a2a-backend", "torch")
DP2_EP2 = ("--tp", "2", "--dp", "2", "--enable-dp-attention", *TORCH_EP)
DP4_EP4 = ("--tp", "4", "--dp", "4", "--enable-dp-attention", *TORCH_EP)
SHORT = ("--disaggregation-timeout", "2")
ATTENTION_TP2 = ("--tp", "2", *TORCH_EP)


@pytest.fixture(scope="module")
def pair(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PdPair]:
    short = ("--disaggregation-timeout", "2")
    checked = (*short, "--disaggregation-checksum")
    with pd_pair(model.folder, tmp_path_factory.mktemp("pd"), (*short, "--chunked-prefill-size", "16"), checked) as pair:
        yield pair


@pytest.fixture(autouse=True)
def no_leak(pair: PdPair) -> Iterator[None]:
    """After each test all pages on both sides come back."""
    yield
    wait_for(lambda: pair.used_tokens() == 0, 20)


@pytest.fixture(scope="module")
def client(pair: PdPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Of the real router in front of the pair."""
    with pd_router([(pair.prefill, pair.bootstrap_port)], [pair.decode], tmp_path_factory.mktemp("router") / "log") as client:
        yield client


def greedy(prompt: list[int] | list[list[int]], num_tokens: int, **sampling: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True, **sampling}
    return {"input_ids": prompt, "sampling_params": params}


def check_tokens(pair: PdPair, model: TinyModel) -> None:
    for prompt in PROMPTS:
        prefilled, decoded = pair.both("/generate", {**greedy(prompt, 6), **pair.room()})
        assert prefilled.status_code == decoded.status_code == 200, (prefilled.text, decoded.text)
        assert decoded.json()["output_ids"] == model.greedy(prompt, 6)
        assert prefilled.json()["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def events_of(client: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_tokens_are_those_of_one_server(pair: PdPair, model: TinyModel) -> None:
    check_tokens(pair, model)
    again = pair.both("/generate", {**greedy(PROMPTS[2], 6), **pair.room()})[1].json()
    assert again["output_ids"] == model.greedy(PROMPTS[2], 6)
    assert again["meta_info"]["cached_tokens"] == 64, "the prefix was found on prefill"


@pytest.mark.parametrize(
    ("prefill_flags", "decode_flags"),
    [
        pytest.param(DP2_EP2, (), id="dp2 ep2 to tp1", marks=pytest.mark.whole),
        pytest.param(DP2_EP2, DP4_EP4, id="dp2 ep2 to dp4 ep4", marks=pytest.mark.whole),
        pytest.param((), ATTENTION_TP2, id="tp1 to attention tp2", marks=pytest.mark.whole),
        pytest.param(ATTENTION_TP2, DP2_EP2, id="attention tp2 to dp2 ep2", marks=pytest.mark.whole),
    ],
)
def test_layouts_may_differ(
    prefill_flags: tuple[str, ...], decode_flags: tuple[str, ...], model: TinyModel, tmp_path: Path
) -> None:
    with pd_pair(model.folder, tmp_path, (*prefill_flags, "--chunked-prefill-size", "32"), decode_flags) as pair:
        check_tokens(pair, model)
        batch = {**greedy(PROMPTS, 5), **pair.room([next_room() for _ in PROMPTS])}
        answers = pair.both("/generate", batch)[1].json()
        assert [answer["output_ids"] for answer in answers] == [model.greedy(prompt, 5) for prompt in PROMPTS]
        wait_for(lambda: pair.used_tokens() == 0, 20)


@pytest.mark.whole
def test_fp8_kv_travels_as_it_is(model: TinyModel, tmp_path: Path) -> None:
    """Tokens are those of one server with FP8 KV; KV of another dtype is refused with both values."""
    fp8 = ("--kv-cache-dtype", "fp8_e4m3")
    checked = (*fp8, *SHORT, "--disaggregation-checksum")
    with (
        pd_pair(model.folder, tmp_path, (*fp8, "--chunked-prefill-size", "16"), checked) as pair,
        LiveServer(model.folder, tmp_path / "unified", *fp8, "--chunked-prefill-size", "16") as unified,
        LiveServer(model.folder, tmp_path / "other", "--disaggregation-mode", "decode", *SHORT) as other,
    ):
        for prompt in PROMPTS:
            body = greedy(prompt, 6)
            prefilled, decoded = pair.both("/generate", {**body, **pair.room()})
            with unified.client() as client:
                expected = client.post("/generate", json=body).json()["output_ids"]
            assert prefilled.status_code == 200 and decoded.json()["output_ids"] == expected
        with other.client() as client:
            refused = client.post("/generate", json={**greedy(PROMPTS[0], 2), **pair.room()})
        assert refused.status_code == 502
        assert "KV dtype differs: prefill has float8_e4m3fn, decode has float32" in refused.json()["error"]["message"]
        wait_for(lambda: pair.used_tokens() == 0, 20)


@pytest.mark.whole
@pytest.mark.skipif(missing_reason("nixl") is not None, reason=str(missing_reason("nixl")))
def test_whole_servers_hand_over_through_nixl(model: TinyModel, tmp_path: Path) -> None:
    nixl = ("--disaggregation-transfer-backend", "nixl")
    checked = (*nixl, "--disaggregation-checksum")
    with pd_pair(model.folder, tmp_path, (*nixl, "--chunked-prefill-size", "16"), checked) as pair:
        check_tokens(pair, model)
        with pair.decode.client() as client:
            rows = {row["capability"]: row["chosen"] for row in client.get("/server_info").json()["resolution"]}
            assert rows["KV transfer"] == "nixl"
        wait_for(lambda: pair.used_tokens() == 0, 20)


def test_the_router_drives_generate(client: httpx.Client, server: LiveServer, model: TinyModel) -> None:
    for prompt in PROMPTS:
        assert client.post("/generate", json=greedy(prompt, 6)).json()["output_ids"] == model.greedy(prompt, 6)
        assert events_of(client, "/generate", greedy(prompt, 6))[-1]["output_ids"] == model.greedy(prompt, 6)
    batch = client.post("/generate", json=greedy(PROMPTS, 4)).json()
    assert [answer["output_ids"] for answer in batch] == [model.greedy(prompt, 4) for prompt in PROMPTS]
    many = client.post("/generate", json=greedy(PROMPTS[0], 4, n=3)).json()
    assert [answer["output_ids"] for answer in many] == [model.greedy(PROMPTS[0], 4)] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_one_server(client: httpx.Client, server: LiveServer, stream: bool) -> None:
    body = {**greedy(PROMPTS[1], 4), "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    with server.client() as unified:
        expected = unified.post("/generate", json=body).json()["meta_info"]
    found = (events_of(client, "/generate", body)[-1] if stream else client.post("/generate", json=body).json())["meta_info"]
    for name in ("input_token_logprobs", "output_token_logprobs"):
        assert [row[1] for row in found[name]] == [row[1] for row in expected[name]], name
        assert [row[0] for row in found[name][1:]] == pytest.approx([row[0] for row in expected[name][1:]], abs=1e-4), name
    many = client.post("/generate", json={**body, **greedy([PROMPTS[0], PROMPTS[1]], 4)}).json()[1]["meta_info"]
    assert len(many["input_token_logprobs"]) == len(PROMPTS[1]) and len(many["output_token_logprobs"]) == 4


def test_the_router_drives_chat_and_completions(client: httpx.Client, server: LiveServer, model: TinyModel) -> None:
    chat = {"model": str(model.folder), "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
    text = {"model": str(model.folder), "prompt": "the fox", "max_tokens": 6, "temperature": 0, "echo": True, "logprobs": 1}
    with server.client() as unified:
        for path, body in (("/v1/chat/completions", {**chat, "n": 2, "logprobs": True}), ("/v1/completions", text)):
            expected, found = (one.post(path, json=body).json()["choices"] for one in (unified, client))
            assert len(found) == len(expected)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.get("text") == theirs.get("text") and ours.get("message") == theirs.get("message")
                tokens = [choice["logprobs"].get("tokens") for choice in (ours, theirs)]
                assert tokens[0] == tokens[1]
        whole = unified.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    parts = [event["choices"][0]["delta"].get("content") or "" for event in events_of(client, "/v1/chat/completions", chat)]
    assert "".join(parts) == whole


def test_a_room_is_used_once(pair: PdPair) -> None:
    fields = pair.room()
    assert [answer.status_code for answer in pair.both("/generate", {**greedy([5, 6], 2), **fields})] == [200, 200]
    for answer in pair.both("/generate", {**greedy([5, 6], 2), **fields}):
        assert answer.status_code == 400
        assert f"bootstrap_room {fields['bootstrap_room']} was used before" in answer.json()["error"]["message"]


def test_a_request_without_a_room_is_told_of_the_router(pair: PdPair) -> None:
    for role, server in (("prefill", pair.prefill), ("decode", pair.decode)):
        with server.client() as client:
            answer = client.post("/generate", json=greedy([5], 1))
            assert answer.status_code == 400 and f"this is a {role} instance" in answer.json()["error"]["message"]
            assert client.get("/health_generate").status_code == 200


def test_a_room_that_never_arrives_ends_with_where_it_was_stuck(pair: PdPair) -> None:
    with pair.prefill.client() as client:
        answer = client.post("/generate", json={**greedy([5, 6], 2), **pair.room()})
    assert answer.status_code == 504
    assert "in state bootstrapping: stuck for 2 s: 0 decode ranks have opened it" in answer.json()["error"]["message"]
    with pair.decode.client() as client:
        answer = client.post("/generate", json={**greedy([5, 6], 2), **pair.room()})
    assert answer.status_code == 504
    assert "the request has not come here" in answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_both_sides(pair: PdPair) -> None:
    body = {**greedy([5, 6, 7], 250), **pair.room(), "stream": True}
    sent = threading.Thread(target=lambda: httpx.post(f"{pair.prefill.url}/generate", json=body, timeout=30))
    sent.start()
    with pair.decode.client() as client, client.stream("POST", "/generate", json=body) as decoding:
        assert decoding.status_code == 200 and json.loads(next(decoding.iter_lines()).removeprefix("data: "))["output_ids"]
    sent.join()
    # `no_leak` sees that all is given back.


def test_server_info_says_the_role(pair: PdPair) -> None:
    for role, server in (("prefill", pair.prefill), ("decode", pair.decode)):
        with server.client() as client:
            info = client.get("/server_info").json()
            assert info["disaggregation_mode"] == role
            rows = {row["capability"]: row["chosen"] for row in info["resolution"]}
            assert rows["KV transfer"] == "tcp" and rows["role"].startswith(role)
            metrics = client.get("/metrics").text
            names = {"prefill": "num_prefill_bootstrap_queue_reqs", "decode": "num_decode_prealloc_queue_reqs"}
            assert f"moesaic:{names[role]}" in metrics
