"""The OpenAI APIs, used through OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from http_server import CONTEXT_LENGTH, HttpServer, byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
# What the template makes of the one message "hi 🦊": the echo rank says it again, and stops at <eos>.
MESSAGES = [{"role": "user", "content": "hi 🦊"}]
SAID = "<|user|>hi 🦊"


@pytest.fixture(scope="module")
def client(server: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=100)
    assert answer.choices[0].message.content == SAID
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_chat_streams_the_same_text(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="echo", messages=MESSAGES, max_tokens=100, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SAID
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 10
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_n_logprobs_and_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="echo", messages=MESSAGES, max_completion_tokens=3, n=2, logprobs=True, top_logprobs=2, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert choice.logprobs.content[0].token == "<bos>"
        assert choice.logprobs.content[0].bytes == list(b"<bos>")
        assert [top.logprob for top in choice.logprobs.content[0].top_logprobs] == [-0.25, -1.25]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


def test_streamed_chat_of_n_answers(client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    entries = 0
    stream = client.chat.completions.create(
        model="echo", messages=MESSAGES, max_tokens=100, n=2, stream=True, stop=["🦊"], logprobs=True
    )
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.logprobs is not None and choice.logprobs.content:
            entries += len(choice.logprobs.content)
    assert texts == {0: "<|user|>hi ", 1: "<|user|>hi "}
    assert entries > 10


def test_chat_continues_the_last_message(client: openai.OpenAI) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "well"}]
    extra = {
        "continue_final_message": True,
        "add_generation_prompt": False,
        "skip_special_tokens": False,
        "ignore_eos": True,
    }
    answer = client.chat.completions.create(model="echo", messages=messages, max_tokens=100, extra_body=extra)
    text = answer.choices[0].message.content
    assert text is not None
    assert text.startswith("<bos><|user|>hi 🦊<eos><|assistant|>well<bos>")


def test_content_parts_and_developer_role(client: openai.OpenAI) -> None:
    messages = [
        {"role": "developer", "content": "be nice"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    answer = client.chat.completions.create(model="echo", messages=messages, extra_body={"ignore_eos": True}, max_tokens=40)
    text = answer.choices[0].message.content
    assert text is not None
    assert "<|system|>be nice<|user|>ab" in text


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="fox", max_tokens=50, stop="x")
    assert answer.choices[0].text == "fo"
    assert answer.choices[0].finish_reason == "stop"


def test_completions_that_name_no_length_get_sixteen_tokens_or_what_fits(client: openai.OpenAI) -> None:
    extra = {"ignore_eos": True}
    for num_prompt, num_new in ((1, 16), (CONTEXT_LENGTH - 3, 3)):
        answer = client.completions.create(model="echo", prompt=[5] * num_prompt, extra_body=extra)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == num_new


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_in_every_chunk_for_those_who_ask(server: HttpServer, path: str) -> None:
    body = {"prompt": [5, 6], "messages": MESSAGES, "max_tokens": 3, "ignore_eos": True, "stream": True}
    events = server.stream(path, {**body, "stream_options": {"include_usage": True, "continuous_usage_stats": True}})
    counts = [json.loads(event)["usage"]["completion_tokens"] for event in events if event != "[DONE]"]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 3


def test_completions_of_a_batch_with_n(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt=[[5, 6], [7]], max_tokens=2, n=2)
    texts = [TOKENIZER.decode(ids) for ids in ([5, 6], [5, 6], [7, 7], [7, 7])]
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_echo_with_logprobs(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(model="echo", prompt="dog", max_tokens=2, echo=True, logprobs=1, stream=stream)
    parts = [chunk.choices[0] for chunk in answer] if isinstance(answer, openai.Stream) else [answer.choices[0]]
    assert "".join(part.text for part in parts).startswith("dog")
    tokens = [token for part in parts if part.logprobs for token in part.logprobs.tokens]
    values = [value for part in parts if part.logprobs for value in part.logprobs.token_logprobs]
    offsets = [offset for part in parts if part.logprobs for offset in part.logprobs.text_offset]
    assert tokens[0] == "<bos>"
    assert values[0] is None
    assert values[-2:] == [-0.25, -0.25]
    assert offsets == [len("".join(tokens[:place])) for place in range(len(tokens))]


def test_streamed_completions(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="echo", prompt="日本", max_tokens=100, stream=True, stop=["本日"], stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "日"
    assert chunks[-1].usage is not None


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="echo", input="hi", instructions="be nice", max_output_tokens=200)
    assert answer.status == "completed"
    assert answer.output_text == "<|system|>be nice"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    cut = client.responses.create(model="echo", input=[{"role": "user", "content": "hi"}], max_output_tokens=3)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_streamed_responses(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="echo", input="hi 🦊", max_output_tokens=100, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == SAID
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == SAID


def test_the_client_s_stream_helper_understands_the_events(client: openai.OpenAI) -> None:
    with client.responses.stream(model="echo", input="hi", max_output_tokens=100) as stream:
        for _event in stream:
            pass
        assert stream.get_final_response().output_text == "<|user|>hi"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").id == "echo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_reach_the_client_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="echo", messages=MESSAGES, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
