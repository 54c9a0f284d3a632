"""POST /v1/completions: prompts as text or token ids, one or a batch."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from moesaic.launch.http.body import read_body
from moesaic.launch.http.errors import bad_request, json_response
from moesaic.launch.http.job import FieldNames, Job, Wants, make_jobs
from moesaic.launch.http.openai_fields import (
    OpenAiBody,
    StreamOptions,
    new_name,
    openai_plan,
    refuse_unsupported,
    usage,
    usage_so_far,
)
from moesaic.launch.http.openai_logprobs import completion_logprobs
from moesaic.launch.http.reply import DONE, EventStream, event, unless_gone
from moesaic.launch.http.rooms import with_rooms
from moesaic.launch.http.run import Generated, Run, Update
from moesaic.launch.http.services import Services

MAX_LOGPROBS = 20
# OpenAI's, as in SGLang and vLLM; chat answers may fill the context.
DEFAULT_MAX_TOKENS = 16


class CompletionBody(OpenAiBody, kw_only=True):
    prompt: str | list[int | str | list[int]]
    suffix: str | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Reply:
    """How to shape one request's answer. `prompts`: the text of each prompt, for echo; empty without it. n: answers
    each.
    """

    id: str
    created: int
    model: str
    prompts: Sequence[str]
    n: int

    def echo(self, sequence: Generated) -> str:
        return self.prompts[sequence.index // self.n] if self.prompts else ""

    def object(self, choices: Sequence[dict[str, Any]], **more: object) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


def make_router(services: Services) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        _refuse(body)
        model = services.check_model(body.model)
        prompts = await _encode_prompts(services, body.prompt)
        name = new_name("cmpl", body.rid)
        jobs = _make_jobs(services, body, prompts, name)
        texts = _echo_texts(services, body, prompts)
        n = len(jobs) // len(prompts)
        reply = _Reply(id=name, created=int(time.time()), model=model, prompts=texts, n=n)
        if body.stream:
            return EventStream(_stream(services, jobs, reply, body.stream_usage()))
        return await unless_gone(request, _whole(services, jobs, reply))

    return router


def _refuse(body: CompletionBody) -> None:
    refuse_unsupported(body)
    if body.suffix:
        raise bad_request("suffix is not supported", "suffix")
    if body.best_of not in (None, 1):
        raise bad_request("best_of is not supported; n gives several answers", "best_of")
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
        raise bad_request(f"logprobs must be in [0, {MAX_LOGPROBS}], got {body.logprobs}", "logprobs")


async def _encode_prompts(services: Services, prompt: str | list[int | str | list[int]]) -> list[list[int]]:
    """Token ids of every prompt: a text, token ids, or a list of either."""
    if isinstance(prompt, list) and prompt and all(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    items = prompt if isinstance(prompt, list) else [prompt]
    if not items:
        raise bad_request("prompt is empty", "prompt")
    if len({type(item) for item in items}) != 1:
        raise bad_request("prompt must be a text, a list of texts, token ids, or a list of lists of token ids", "prompt")
    encoded: list[list[int]] = []
    for item in items:
        if not item:
            raise bad_request("prompt is empty", "prompt")
        if isinstance(item, str):
            encoded.append(await services.need_tokenizer("prompt").encode_async(item))
        elif isinstance(item, list):
            encoded.append(item)
    return encoded


def _make_jobs(services: Services, body: CompletionBody, prompts: Sequence[list[int]], name: str) -> list[Job]:
    is_default = body.max_tokens is None
    plan = openai_plan(services, body, DEFAULT_MAX_TOKENS if is_default else body.max_tokens, "max_tokens")
    plan = replace(plan, max_is_default=is_default)
    asked = body.logprobs is not None
    if asked:
        services.need_tokenizer("logprobs")
    wants = Wants(logprobs=asked, top=body.logprobs or 0, start=0 if body.echo and asked else -1)
    names = FieldNames(prompt="prompt", max_tokens="max_tokens", top_logprobs="logprobs")
    jobs = [
        job
        for input_ids in prompts
        for job in make_jobs(
            name,
            input_ids,
            plan,
            services.limits,
            names,
            wants=wants,
            priority=body.priority or 0,
            dp_rank=body.pinned(),
        )
    ]
    return with_rooms(services.config, body, jobs, len(prompts))


def _echo_texts(services: Services, body: CompletionBody, prompts: Sequence[list[int]]) -> list[str]:
    if not body.echo:
        return []
    if isinstance(body.prompt, str):
        return [body.prompt]
    texts = [item for item in body.prompt if isinstance(item, str)]
    return texts or [services.need_tokenizer("echo").decode(input_ids) for input_ids in prompts]


async def _whole(services: Services, jobs: Sequence[Job], reply: _Reply) -> Response:
    with Run(services, jobs) as run:
        sequences = await run.finished()
    choices = [_choice(services, sequence, reply) for sequence in sequences]
    return json_response(reply.object(choices, usage=usage(sequences)))


def _choice(services: Services, sequence: Generated, reply: _Reply) -> dict[str, Any]:
    logprobs = None
    wants = sequence.job.wants
    if wants.logprobs:
        rows = [*sequence.prompt_logprobs, *sequence.logprobs] if reply.prompts else sequence.logprobs
        logprobs = completion_logprobs(services.need_tokenizer("logprobs"), rows, wants.top > 0, 0)
    text = reply.echo(sequence) + sequence.text
    return {"index": sequence.index, "text": text, "logprobs": logprobs, **_ending(sequence)}


def _ending(sequence: Generated) -> dict[str, Any]:
    finish = sequence.finish
    if finish is None:
        return {"finish_reason": None}
    return {"finish_reason": finish.kind, "matched_stop": finish.matched}


async def _stream(services: Services, jobs: Sequence[Job], reply: _Reply, options: StreamOptions) -> AsyncGenerator[bytes, None]:
    offsets = [0] * len(jobs)
    with Run(services, jobs) as run:
        async for update in run.updates():
            choice = _chunk_choice(services, update, reply, offsets)
            if choice["text"] or choice["logprobs"] is not None or update.sequence.finish is not None:
                yield event(reply.object([choice], **usage_so_far(options, run.sequences)))
        if options.include_usage:
            yield event(reply.object([], usage=usage(run.sequences)))
    yield DONE


def _chunk_choice(services: Services, update: Update, reply: _Reply, offsets: list[int]) -> dict[str, Any]:
    sequence = update.sequence
    text = reply.echo(sequence) + update.text if update.first else update.text
    logprobs = None
    wants = sequence.job.wants
    rows = [*sequence.prompt_logprobs, *update.logprobs] if update.first and reply.prompts else update.logprobs
    if wants.logprobs and rows:
        tokenizer = services.need_tokenizer("logprobs")
        logprobs = completion_logprobs(tokenizer, rows, wants.top > 0, offsets[sequence.index])
        offsets[sequence.index] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
    return {"index": sequence.index, "text": text, "logprobs": logprobs, **_ending(sequence)}
