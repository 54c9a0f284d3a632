"""Prefill and decode on servers of their own: the tokens are those of one server, whatever the layouts, and nothing leaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from http_server import wait_for
from pd_servers import PdPair, pd_pair
from tiny_models import TinyModel

PROMPTS = [[9, 8, 7, 6], [11] * 20, list(range(40, 110)), [300, 200, 100, 50, 25]]


@pytest.fixture(scope="module")
def pair(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PdPair]:
    flags = ("--chunked-prefill-size", "16", "--disaggregation-timeout", "3")
    with pd_pair(model.folder, tmp_path_factory.mktemp("pd"), flags, ("--disaggregation-timeout", "3")) as pair:
        yield pair
        wait_for(lambda: pair.used_tokens() == 0, 20)


def greedy(prompt: list[int], num_tokens: int) -> dict[str, object]:
    return {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}}


def test_tokens_are_those_of_one_server(pair: PdPair, model: TinyModel) -> None:
    for prompt in PROMPTS:
        prefilled, decoded = pair.both("/generate", {**greedy(prompt, 6), **pair.room()})
        assert prefilled.status_code == decoded.status_code == 200, (prefilled.text, decoded.text)
        assert decoded.json()["output_ids"] == model.greedy(prompt, 6)
        assert prefilled.json()["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
