"""Every bad input of the issue gets its status and a body that names the field; none of them reaches a rank."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from http_server import HttpServer, write_tokenizer

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
PD = {"bootstrap_host": "h", "bootstrap_port": 8998, "bootstrap_room": 3}


def native(**params: Any) -> dict[str, Any]:
    return {"input_ids": [5], "sampling_params": params}


# path, body, status, what `param` must be
TABLE: list[tuple[str, Any, int, str | None]] = [
    ("/generate", {}, 400, "text"),
    ("/generate", [], 400, None),
    ("/generate", {"text": "a", "input_ids": [5]}, 400, "text"),
    ("/generate", {"text": ""}, 400, "text"),
    ("/generate", {"text": []}, 400, "text"),
    ("/generate", {"text": ["a", ""]}, 400, "text"),
    ("/generate", {"text": 5}, 400, "text"),
    ("/generate", {"text": ["a", 5]}, 400, "text[1]"),
    ("/generate", {"input_ids": []}, 400, "input_ids"),
    ("/generate", {"input_ids": [[]]}, 400, "input_ids"),
    ("/generate", {"input_ids": [5, [6]]}, 400, "input_ids"),
    ("/generate", {"input_ids": [[6], 5]}, 400, "input_ids"),
    ("/generate", {"input_ids": [5, "6"]}, 400, "input_ids[1]"),
    ("/generate", {"input_ids": [5, -1]}, 400, "input_ids"),
    ("/generate", {"input_ids": [400]}, 400, "input_ids"),
    ("/generate", {"input_ids": [10**30]}, 400, "input_ids"),
    ("/generate", {"input_ids": [5], "sampling_params": []}, 400, "sampling_params"),
    ("/generate", {"input_ids": [[5], [6]], "sampling_params": [{}]}, 400, "sampling_params"),
    ("/generate", {"input_ids": [5], "sampling_params": "x"}, 400, "sampling_params"),
    ("/generate", native(temperatur=1), 400, "sampling_params.temperatur"),
    ("/generate", native(temperature=-0.1), 400, "sampling_params.temperature"),
    ("/generate", native(temperature="hot"), 400, "sampling_params.temperature"),
    ("/generate", native(temperature=True), 400, "sampling_params.temperature"),
    ("/generate", native(top_p=0), 400, "sampling_params.top_p"),
    ("/generate", native(top_p=1.01), 400, "sampling_params.top_p"),
    ("/generate", native(top_k=0), 400, "sampling_params.top_k"),
    ("/generate", native(top_k=-2), 400, "sampling_params.top_k"),
    ("/generate", native(top_k=1.5), 400, "sampling_params.top_k"),
    ("/generate", native(min_p=1.5), 400, "sampling_params.min_p"),
    ("/generate", native(frequency_penalty=2.1), 400, "sampling_params.frequency_penalty"),
    ("/generate", native(presence_penalty=-2.1), 400, "sampling_params.presence_penalty"),
    ("/generate", native(repetition_penalty=0), 400, "sampling_params.repetition_penalty"),
    ("/generate", native(n=0), 400, "sampling_params.n"),
    ("/generate", native(n=10**6), 400, "sampling_params.n"),
    ("/generate", native(seed=1 << 63), 400, "sampling_params.seed"),
    ("/generate", native(max_new_tokens=-1), 400, "sampling_params.max_new_tokens"),
    ("/generate", native(max_new_tokens=512), 400, "sampling_params.max_new_tokens"),
    ("/generate", native(min_new_tokens=5, max_new_tokens=4), 400, "sampling_params.min_new_tokens"),
    ("/generate", native(stop=5), 400, "sampling_params.stop"),
    ("/generate", native(stop=["a", 5]), 400, "sampling_params.stop"),
    ("/generate", native(stop=["x" * 1000] * 1000), 400, "sampling_params.stop"),
    ("/generate", native(stop="x" * 1_000_000), 400, "sampling_params.stop"),
    ("/generate", native(stop_token_ids=[400]), 400, "sampling_params.stop_token_ids"),
    ("/generate", native(stop_token_ids="5"), 400, "sampling_params.stop_token_ids"),
    ("/generate", native(ignore_eos=1), 400, "sampling_params.ignore_eos"),
    ("/generate", native(json_schema="{}"), 400, "sampling_params.json_schema"),
    ("/generate", native(regex="a*"), 400, "sampling_params.regex"),
    ("/generate", native(ebnf="x"), 400, "sampling_params.ebnf"),
    ("/generate", native(structural_tag="x"), 400, "sampling_params.structural_tag"),
    ("/generate", {"input_ids": [5] * 512}, 400, "input_ids"),
    ("/generate", {"input_ids": [5], "data_parallel_rank": 2}, 400, "data_parallel_rank"),
    ("/generate", {"input_ids": [5], "routed_dp_rank": -1}, 400, "data_parallel_rank"),
    ("/generate", {"input_ids": [5], "return_logprob": True, "top_logprobs_num": 99}, 400, "top_logprobs_num"),
    ("/generate", {"input_ids": [5], "return_logprob": True, "logprob_start_len": 2}, 400, "logprob_start_len"),
    ("/generate", {"input_ids": [5], "token_ids_logprob": [1]}, 400, "token_ids_logprob"),
    ("/generate", {"input_ids": [5], "stream": "yes"}, 400, "stream"),
    ("/generate", {"input_ids": [5], "priority": 10**30}, 400, "priority"),
    ("/generate", {"input_ids": [5], "return_hidden_states": True}, 400, "return_hidden_states"),
    ("/generate", {"input_ids": [5], "custom_logit_processor": "x"}, 400, "custom_logit_processor"),
    ("/generate", {"input_ids": [5], "extra_key": "tenant"}, 400, "extra_key"),
    ("/generate", native(repetition_penalty=1e-300), 400, "sampling_params.repetition_penalty"),
    *[("/generate", {"input_ids": [5], name: value}, 400, name) for name, value in PD.items()],
    ("/v1/chat/completions", {}, 400, "messages"),
    ("/v1/chat/completions", {"messages": "hi"}, 400, "messages"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": ["hi"]}, 400, "messages[0]"),
    ("/v1/chat/completions", {"messages": [{"content": "hi"}]}, 400, "messages[0].role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages[0].content[0]",
    ),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
    ("/v1/chat/completions", {**CHAT, "model": "gpt-4"}, 404, "model"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 512}, 400, "max_tokens"),
    ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 512}, 400, "max_completion_tokens"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": "5"}, 400, "max_tokens"),
    ("/v1/chat/completions", {**CHAT, "temperature": -1}, 400, "temperature"),
    ("/v1/chat/completions", {**CHAT, "top_logprobs": 5}, 400, "top_logprobs"),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ("/v1/chat/completions", {**CHAT, "logit_bias": {"5": 1}}, 400, "logit_bias"),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools"),
    ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ("/v1/chat/completions", {**CHAT, "stop": ["x"] * 65}, 400, "stop"),
    ("/v1/chat/completions", {**CHAT, "continue_final_message": True}, 400, "continue_final_message"),
    ("/v1/chat/completions", {**CHAT, "bootstrap_room": [1, 2]}, 400, "bootstrap_room"),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": ""}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": ["a", [5]]}, 400, "prompt"),
    ("/v1/completions", {"prompt": [400]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    ("/v1/completions", {"prompt": "a", "best_of": 2}, 400, "best_of"),
    ("/v1/completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10_000}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "model"),
    ("/v1/completions", {"prompt": "a", "guided_json": {"type": "object"}}, 400, "guided_json"),
    ("/v1/completions", {"prompt": "a", "priority": -(10**30)}, 400, "priority"),
    ("/v1/responses", {"input": ""}, 400, "input"),
    ("/v1/responses", {"input": "a", "top_logprobs": 3}, 400, "top_logprobs"),
    ("/v1/responses", {"input": [{"type": "function_call_output"}]}, 400, "input[0]"),
    ("/v1/responses", {"input": "a", "previous_response_id": "x"}, 400, "previous_response_id"),
    ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema"}}}, 400, "text.format"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 9999}, 400, "max_output_tokens"),
    ("/abort_request", {}, 400, "rid"),
    ("/start_profile", {"num_steps": -1}, 400, "num_steps"),
    ("/configure_logging", {"log_requests_level": 4}, 400, "log_requests_level"),
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": []}, 400, "prompt"),
    ("/tokenize", {"messages": []}, 400, "messages"),
    ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
    ("/detokenize", {"tokens": [5, [6]]}, 400, "tokens"),
    ("/detokenize", {"tokens": [400]}, 400, "tokens"),
    ("/detokenize", {"tokens": "5"}, 400, "tokens"),
    ("/encode", {"text": "a"}, 400, None),
    ("/v1/embeddings", {"input": "a"}, 400, None),
    ("/v1/responses/resp-1/cancel", {}, 400, None),
    ("/nowhere", {}, 404, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), TABLE)
def test_bad_fields(server: HttpServer, path: str, body: Any, status: int, param: str | None) -> None:
    sent = sum(len(rank.generates()) for rank in server.ranks)
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert error["message"]
    assert len(answer.text) < 1000, "a refusal must not repeat a huge input"
    assert sum(len(rank.generates()) for rank in server.ranks) == sent


def test_what_a_router_adds_without_asking_for_anything_is_tolerated(server: HttpServer) -> None:
    added = {
        "return_hidden_states": False,
        "lora_path": None,
        "session_params": {},
        "image_data": [],
        "log_metrics": True,
        "model": None,
    }
    assert server.generate(input_ids=[5], sampling_params={"max_new_tokens": 1}, **added)["output_ids"] == [5]


VALID = {
    "/generate": b'"input_ids": [5]',
    "/v1/chat/completions": b'"messages": []',
    "/v1/completions": b'"prompt": "a"',
    "/v1/responses": b'"input": "a"',
}


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (b"", "not valid JSON"),
        (b"}}", "not valid JSON"),
        (b',"rid": "a",}', "not valid JSON"),
        (b',"rid": "\xff\xfe"}', "UTF-8"),
        (b',"rid": "\\ud800"}', "not valid JSON"),
        (b',"temperature": NaN}', "temperature"),
        (b',"sampling_params": {"temperature": -Infinity}}', "temperature"),
        (b',"x": ' + b"[" * 100_000, "nested"),
    ],
)
@pytest.mark.parametrize("path", list(VALID))
def test_bad_bodies(server: HttpServer, path: str, rest: bytes, words: str) -> None:
    answer = server.http.post(path, content=b"{" + VALID[path] + rest)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"5", b"\xff\xfe"])
def test_bodies_that_are_no_object(server: HttpServer, body: bytes) -> None:
    assert server.http.post("/generate", content=body).status_code == 400


def test_the_context_refusal_has_the_numbers(server: HttpServer) -> None:
    answer = server.post("/generate", {"input_ids": [5] * 100, "sampling_params": {"max_new_tokens": 500}})
    message = answer.json()["error"]["message"]
    assert all(number in message for number in ("100", "500", "600", "512"))
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_wrong_method(server: HttpServer) -> None:
    answer = server.http.get("/generate")
    assert answer.status_code == 405
    assert answer.json()["error"]["message"]


def test_the_http2_probe_of_routers_gets_a_clean_refusal(server: HttpServer) -> None:
    with socket.create_connection(("127.0.0.1", server.config.port), timeout=5) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 4")


def test_api_key(model_path: Path) -> None:
    body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
    with HttpServer(model_path, api_key="sekrit") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sekrit"}):
            answer = server.post("/generate", body, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert server.post("/generate", body, headers={"Authorization": "Bearer sekrit"}).status_code == 200
        assert server.http.get("/v1/models").status_code == 401
        for path in ("/health", "/metrics", "/health_generate", "/ready"):
            assert server.http.get(path).status_code == 200


def test_without_tokenizer_files_text_is_refused_and_ids_are_served(tmp_path: Path) -> None:
    with HttpServer(tmp_path) as server:
        for path, body in (
            ("/generate", {"text": "a"}),
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/responses", {"input": "a"}),
        ):
            answer = server.post(path, body)
            assert answer.status_code == 400
            assert "tokenizer.json" in answer.json()["error"]["message"]
        answer = server.post("/generate", native(max_new_tokens=2, stop="x"))
        assert answer.status_code == 400
        assert server.generate(**native(max_new_tokens=2))["output_ids"] == [5, 5]


def test_a_model_without_chat_template_says_so(tmp_path: Path) -> None:
    with HttpServer(write_tokenizer(tmp_path, template=None)) as server:
        answer = server.post("/v1/chat/completions", CHAT)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "no_chat_template"


def test_a_full_queue_is_429_with_retry_after(model_path: Path) -> None:
    with HttpServer(model_path, max_running_requests=2, max_queued_requests=1) as server:
        (rank,) = server.ranks
        rank.paused = True
        four = {"input_ids": [[5], [6], [7], [8]], "sampling_params": {"max_new_tokens": 1}}
        answer = server.post("/generate", four)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert not rank.generates()
        rank.paused = False
        assert server.post("/generate", {**four, "input_ids": [[5], [6], [7]]}).status_code == 200
        assert server.http.get("/health_generate").status_code == 200
