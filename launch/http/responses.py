"""POST /v1/responses: OpenAI's newer API, text in and text out. Nothing is stored: no previous_response_id, no
background.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from moesaic.launch.http.body import read_body
from moesaic.launch.http.errors import bad_request, json_response
from moesaic.launch.http.job import FieldNames, Job, make_jobs
from moesaic.launch.http.messages_text import clean_message, encode_messages
from moesaic.launch.http.openai_fields import (
    OpenAiBody,
    new_name,
    openai_plan,
    refuse_format,
    refuse_tool_choice,
    refuse_tools,
    refuse_unsupported,
)
from moesaic.launch.http.reply import EventStream, unless_gone
from moesaic.launch.http.responses_events import ResponseShape, stream_events
from moesaic.launch.http.rooms import with_rooms
from moesaic.launch.http.run import Run
from moesaic.launch.http.services import Services


class ResponsesBody(OpenAiBody, kw_only=True):
    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    text: dict[str, Any] | None = None
    include: list[Any] | None = None
    prompt: Any = None
    metadata: dict[str, Any] | None = None
    request_id: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def make_router(services: Services) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(request: Request) -> Response:
        body = await read_body(request, ResponsesBody)
        _refuse(body)
        shape = ResponseShape(
            id=new_name("resp", body.request_id),
            item_id=new_name("msg"),
            created_at=int(time.time()),
            model=services.check_model(body.model),
            settings=_settings(body),
        )
        jobs = await _make_jobs(services, body, shape.id)
        if body.stream:
            return EventStream(stream_events(services, jobs, shape))
        return await unless_gone(request, _whole(services, jobs, shape))

    return router


async def _whole(services: Services, jobs: Sequence[Job], shape: ResponseShape) -> Response:
    with Run(services, jobs) as run:
        (sequence,) = await run.finished()
    return json_response(shape.ended(sequence))


def _refuse(body: ResponsesBody) -> None:
    refuse_unsupported(body)
    refuse_tools(body.tools, "tools")
    refuse_tool_choice(body.tool_choice)
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name) is not None:
            raise bad_request(f"{name} is not supported: this server stores no responses", name)
    if body.background:
        raise bad_request("background is not supported", "background")
    if body.include:
        raise bad_request("include is not supported", "include")
    if body.n not in (None, 1):
        raise bad_request("n: a response holds one answer", "n")
    refuse_format((body.text or {}).get("format"), "text.format")


def _settings(body: ResponsesBody) -> dict[str, Any]:
    """What the answer repeats of the request."""
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "temperature": body.temperature,
        "top_p": body.top_p,
    }


async def _make_jobs(services: Services, body: ResponsesBody, name: str) -> list[Job]:
    plan = openai_plan(services, body, body.max_output_tokens, "max_output_tokens")
    input_ids = await encode_messages(services, _messages(body), "input", extra=body.chat_template_kwargs)
    names = FieldNames(prompt="input", max_tokens="max_output_tokens")
    priority = body.priority or 0
    jobs = make_jobs(name, input_ids, plan, services.limits, names, priority=priority, dp_rank=body.pinned())
    return with_rooms(services.config, body, jobs, 1)


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    items: list[Any] = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    if not items or body.input == "":
        raise bad_request("input is empty", "input")
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    for index, item in enumerate(items):
        param = f"input[{index}]"
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        if kind == "reasoning":
            continue  # What the model thought in an earlier turn is not part of the conversation.
        if kind != "message":
            raise bad_request(f"{param}: items of type {kind!r} are not supported", param)
        clean = clean_message(item, param)
        messages.append({"role": clean["role"], "content": clean["content"]})
    return messages
