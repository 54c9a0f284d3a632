"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from moesaic.launch.http.body import read_body
from moesaic.launch.http.errors import bad_request, json_response
from moesaic.launch.http.job import FieldNames, Job, Wants, make_jobs
from moesaic.launch.http.messages_text import clean_message, encode_messages
from moesaic.launch.http.openai_fields import (
    OpenAiBody,
    StreamOptions,
    new_name,
    openai_plan,
    refuse_tool_choice,
    refuse_tools,
    refuse_unsupported,
    usage,
    usage_so_far,
)
from moesaic.launch.http.openai_logprobs import chat_logprobs
from moesaic.launch.http.reply import DONE, EventStream, event, unless_gone
from moesaic.launch.http.rooms import with_rooms
from moesaic.launch.http.run import Generated, Run, Update
from moesaic.launch.http.services import Services

MAX_TOP_LOGPROBS = 20


class ChatBody(OpenAiBody, kw_only=True):
    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class _Head(msgspec.Struct, kw_only=True, frozen=True):
    """What every chunk of one answer says."""

    id: str
    created: int
    model: str

    def chunk(self, choices: Sequence[dict[str, Any]], **more: object) -> dict[str, Any]:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


def make_router(services: Services) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        head = _Head(id=new_name("chatcmpl", body.rid), created=int(time.time()), model=services.check_model(body.model))
        jobs = await _make_jobs(services, body, head.id)
        if body.stream:
            return EventStream(_stream(services, jobs, head, body.stream_usage()))
        return await unless_gone(request, _whole(services, jobs, head))

    return router


async def _make_jobs(services: Services, body: ChatBody, name: str) -> list[Job]:
    refuse_unsupported(body)
    refuse_tools(body.tools, "tools")
    refuse_tools(body.functions, "functions")
    refuse_tool_choice(body.tool_choice)
    top = body.top_logprobs or 0
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        raise bad_request(f"top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {top}", "top_logprobs")
    if top and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    newer = body.max_completion_tokens is not None
    max_tokens_name = "max_completion_tokens" if newer else "max_tokens"
    max_tokens = body.max_completion_tokens if newer else body.max_tokens
    plan = openai_plan(services, body, max_tokens, max_tokens_name)
    messages = [clean_message(message, f"messages[{index}]") for index, message in enumerate(body.messages)]
    input_ids = await encode_messages(
        services,
        messages,
        "messages",
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        extra=body.chat_template_kwargs,
    )
    jobs = make_jobs(
        name,
        input_ids,
        plan,
        services.limits,
        FieldNames(prompt="messages", max_tokens=max_tokens_name),
        wants=Wants(logprobs=bool(body.logprobs), top=top),
        priority=body.priority or 0,
        dp_rank=body.pinned(),
    )
    return with_rooms(services.config, body, jobs, 1)


async def _whole(services: Services, jobs: Sequence[Job], head: _Head) -> Response:
    with Run(services, jobs) as run:
        sequences = await run.finished()
    return json_response(
        {
            "id": head.id,
            "object": "chat.completion",
            "created": head.created,
            "model": head.model,
            "choices": [_choice(services, sequence) for sequence in sequences],
            "usage": usage(sequences),
        }
    )


def _choice(services: Services, sequence: Generated) -> dict[str, Any]:
    message = {"role": "assistant", "content": sequence.text, "refusal": None, "tool_calls": None}
    logprobs = None
    if sequence.job.wants.logprobs:
        logprobs = chat_logprobs(services.need_tokenizer("logprobs"), sequence.logprobs)
    return {"index": sequence.index, "message": message, "logprobs": logprobs, **_ending(sequence)}


def _ending(sequence: Generated) -> dict[str, Any]:
    finish = sequence.finish
    if finish is None:
        return {"finish_reason": None}
    return {"finish_reason": finish.kind, "matched_stop": finish.matched}


async def _stream(services: Services, jobs: Sequence[Job], head: _Head, options: StreamOptions) -> AsyncGenerator[bytes, None]:
    with Run(services, jobs) as run:
        async for update in run.updates():
            more = usage_so_far(options, run.sequences)
            for choice in _chunk_choices(services, update):
                yield event(head.chunk([choice], **more))
        if options.include_usage:
            yield event(head.chunk([], usage=usage(run.sequences)))
    yield DONE


def _chunk_choices(services: Services, update: Update) -> list[dict[str, Any]]:
    """The role first, then the text, then the end: what one update gives to send."""
    sequence = update.sequence
    choices: list[dict[str, Any]] = []

    def add(delta: dict[str, Any], logprobs: dict[str, Any] | None = None, **ending: object) -> None:
        choices.append({"index": sequence.index, "delta": delta, "logprobs": logprobs, **(ending or {"finish_reason": None})})

    if update.first:
        add({"role": "assistant", "content": ""})
    logprobs = None
    if sequence.job.wants.logprobs and update.logprobs:
        logprobs = chat_logprobs(services.need_tokenizer("logprobs"), update.logprobs)
    if update.text or logprobs is not None:
        add({"content": update.text}, logprobs)
    if sequence.finish is not None:
        add({}, None, **_ending(sequence))
    return choices
