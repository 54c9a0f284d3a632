"""The native /generate: shapes of whole and streamed answers, batches, n, stops, logprobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from http_server import HttpServer, byte_level_tokenizer, wait_for

TOKENIZER = byte_level_tokenizer()
PROMPT = [TOKENIZER.token_to_id("h"), TOKENIZER.token_to_id("i"), TOKENIZER.token_to_id("!")]


def test_one_prompt_gives_one_answer(server: HttpServer) -> None:
    answer = server.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 5}, rid="mine")
    assert answer["output_ids"] == [*PROMPT, *PROMPT[:2]]
    assert answer["text"] == "hi!hi"
    meta = answer["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 5, 1)
    assert meta["e2e_latency"] > 0
    assert meta["dp_rank"] in (0, 1)
    assert "output_token_logprobs" not in meta


def test_text_gets_the_beginning_token(server: HttpServer) -> None:
    answer = server.generate(text="hi!", sampling_params={"max_new_tokens": 4, "skip_special_tokens": False})
    assert answer["output_ids"][0] == 0
    assert answer["text"] == "<bos>hi!"


def test_a_batch_and_n_give_a_list_in_order(server: HttpServer) -> None:
    answers = server.generate(input_ids=[[5, 6], [7]], sampling_params=[{"max_new_tokens": 3}, {"max_new_tokens": 1}])
    assert [answer["output_ids"] for answer in answers] == [[5, 6, 5], [7]]
    answers = server.generate(text=["a", "b"], sampling_params={"max_new_tokens": 2, "n": 2}, rid=["x", "y"])
    assert [answer["meta_info"]["id"] for answer in answers] == ["x", "x", "y", "y"]


def test_several_answers_have_different_seeds(server: HttpServer) -> None:
    before = [len(rank.generates()) for rank in server.ranks]
    server.generate(input_ids=[5], sampling_params={"max_new_tokens": 1, "n": 3, "seed": 7})
    sent = [m for rank, start in zip(server.ranks, before, strict=True) for m in rank.generates()[start:]]
    assert sorted(message.sampling.seed for message in sent) == [7, 8, 9]


def test_requests_without_a_seed_get_the_same_ones_from_the_same_random_seed(model_path: Path) -> None:
    drawn = []
    for random_seed in (11, 11, 12):
        with HttpServer(model_path, random_seed=random_seed) as server:
            server.generate(input_ids=[[5], [6]], sampling_params={"max_new_tokens": 1})
            drawn.append([message.sampling.seed for message in server.ranks[0].generates()])

    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 4


def test_streamed_text_is_cumulative_and_ends_with_done(server: HttpServer) -> None:
    events = server.stream("/generate", {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 3}, "stream": True})
    assert events[-1] == "[DONE]"
    answers = [json.loads(event) for event in events[:-1]]
    assert [answer["text"] for answer in answers] == ["h", "hi", "hi!"]
    assert [answer["meta_info"]["finish_reason"] for answer in answers[:-1]] == [None, None]
    assert answers[-1]["meta_info"]["finish_reason"]["type"] == "length"


def test_a_streamed_batch_is_told_apart_by_index(server: HttpServer) -> None:
    body = {"input_ids": [[5], [6]], "sampling_params": {"max_new_tokens": 2}, "stream": True}
    last: dict[int, Any] = {}
    for event in server.stream("/generate", body)[:-1]:
        answer = json.loads(event)
        last[answer["index"]] = answer["output_ids"]
    assert last == {0: [5, 5], 1: [6, 6]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_ends_the_text_before_it(server: HttpServer, stream: bool) -> None:
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 50, "stop": ["!h", "zzz"]}, "stream": stream}
    if stream:
        texts = [json.loads(event)["text"] for event in server.stream("/generate", body)[:-1]]
        assert all("hi".startswith(text) for text in texts)
        answer = json.loads(server.stream("/generate", body)[-2])
    else:
        answer = server.generate(**body)
    assert answer["text"] == "hi"
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "!h"}
    assert answer["output_ids"] == [*PROMPT, PROMPT[0]]


def test_the_ranks_are_told_of_a_stop_string(server: HttpServer) -> None:
    answer = server.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 400, "stop": "i!"})
    rank = server.ranks[answer["meta_info"]["dp_rank"]]
    last = rank.generates()[-1]
    wait_for(lambda: any(message.rid == last.rid and message.finish for message in rank.aborts()))


def test_no_stop_trim_keeps_the_stop(server: HttpServer) -> None:
    answer = server.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 9, "stop": "i!", "no_stop_trim": True})
    assert answer["text"] == "hi!"


def test_a_stop_token_is_counted_but_not_shown(server: HttpServer) -> None:
    params = {"max_new_tokens": 9, "stop_token_ids": [PROMPT[2]]}
    answer = server.generate(input_ids=PROMPT, sampling_params=params)
    assert answer["text"] == "hi"
    assert answer["output_ids"] == PROMPT
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": PROMPT[2]}


def test_ignore_eos_takes_the_model_s_stop_tokens_away(server: HttpServer) -> None:
    plain = server.generate(input_ids=[5, 1], sampling_params={"max_new_tokens": 4})
    assert plain["output_ids"] == [5, 1]
    ignoring = server.generate(input_ids=[5, 1], sampling_params={"max_new_tokens": 4, "ignore_eos": True})
    assert ignoring["output_ids"] == [5, 1, 5, 1]


def test_logprobs_have_the_native_form(server: HttpServer) -> None:
    meta = server.generate(
        input_ids=PROMPT,
        sampling_params={"max_new_tokens": 2},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
    )["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.25, PROMPT[0], "h"], [-0.25, PROMPT[1], "i"]]
    assert meta["input_token_logprobs"][0] == [None, PROMPT[0], "h"]
    assert meta["input_token_logprobs"][1] == [-1.0, PROMPT[1], "i"]
    assert meta["input_top_logprobs"][0] is None
    assert [row[1] for row in meta["output_top_logprobs"][0]] == [PROMPT[0], PROMPT[0] + 1]


def test_no_new_tokens_is_a_prefill_alone(server: HttpServer) -> None:
    answer = server.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 0})
    assert (answer["text"], answer["output_ids"]) == ("", [])
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def test_the_default_number_of_tokens_gives_way_to_the_context(server: HttpServer) -> None:
    answer = server.generate(input_ids=[5] * 500)
    assert answer["meta_info"]["completion_tokens"] == 12
    answer = server.generate(input_ids=[5])
    assert answer["meta_info"]["completion_tokens"] == 128


@pytest.mark.parametrize("field", ["data_parallel_rank", "routed_dp_rank"])
def test_a_request_can_be_pinned_to_a_dp_rank(server: HttpServer, field: str) -> None:
    for rank in (1, 1, 0, 1):
        answer = server.generate(**{"input_ids": [5], "sampling_params": {"max_new_tokens": 1}, field: rank})
        assert answer["meta_info"]["dp_rank"] == rank


def test_what_a_router_adds_is_tolerated(server: HttpServer) -> None:
    extra = {
        "model": None,
        "log_metrics": True,
        "background": False,
        "no_logs": False,
        "return_bytes": False,
        "return_entropy": False,
        "return_hidden_states": False,
        "no_stop_trim": False,
        "separate_reasoning": True,
        "bootstrap_room": None,
    }
    answer = server.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 1}, **extra)
    assert answer["text"] == "h"
