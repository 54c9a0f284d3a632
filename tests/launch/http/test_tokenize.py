"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from http_server import CONTEXT_LENGTH, TEXT, HttpServer


def ask(server: HttpServer, path: str, **body: Any) -> Any:
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_token_ids_are_those_a_prompt_is_run_with(server: HttpServer) -> None:
    answer = ask(server, "/tokenize", prompt=TEXT)
    usage = ask(server, "/v1/completions", prompt=TEXT, max_tokens=1)["usage"]
    assert answer["count"] == len(answer["tokens"]) == usage["prompt_tokens"]
    assert answer["max_model_len"] == CONTEXT_LENGTH
    messages = [{"role": "user", "content": "hi"}]
    usage = ask(server, "/v1/chat/completions", messages=messages, max_tokens=1)["usage"]
    assert ask(server, "/v1/tokenize", messages=messages)["count"] == usage["prompt_tokens"]


def test_text_survives_the_way_there_and_back(server: HttpServer) -> None:
    tokens = ask(server, "/tokenize", prompt=["fox", TEXT], add_special_tokens=False)
    assert tokens["count"] == [len(ids) for ids in tokens["tokens"]]
    assert ask(server, "/v1/detokenize", tokens=tokens["tokens"])["text"] == ["fox", TEXT]
    assert ask(server, "/detokenize", tokens=tokens["tokens"][1])["text"] == TEXT
    assert ask(server, "/detokenize", tokens=[])["text"] == ""
    assert ask(server, "/detokenize", tokens=[1], skip_special_tokens=False)["text"] == "<eos>"
