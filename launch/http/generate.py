"""The native API, SGLang's /generate: one prompt or a batch, text or token ids, whole or streamed (cumulative) answers."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from moesaic.launch.engine.messages import TokenLogprobs
from moesaic.launch.http.body import read_body
from moesaic.launch.http.errors import bad_request, json_response
from moesaic.launch.http.job import FieldNames, Job, Priority, Wants, make_jobs
from moesaic.launch.http.reply import DONE, EventStream, event, unless_gone
from moesaic.launch.http.rooms import RoomFields, with_rooms
from moesaic.launch.http.run import Finish, Generated, Run
from moesaic.launch.http.sampling import Plan, make_plan
from moesaic.launch.http.services import Services

T = TypeVar("T")


class GenerateBody(RoomFields, kw_only=True):
    """The fields that mean something here; a router may add others. A batch may give lists where noted."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: str | list[str] | None = None
    stream: bool | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool | None = None
    no_stop_trim: bool | None = None
    priority: Priority | None = None
    data_parallel_rank: int | None = None
    routed_dp_rank: int | None = None


def make_router(services: Services) -> APIRouter:
    router = APIRouter()

    @router.api_route("/generate", methods=["POST", "PUT"])
    async def generate(request: Request) -> Response:
        body = await read_body(request, GenerateBody)
        jobs = await _make_jobs(services, body)
        single = not _is_batch(body) and len(jobs) == 1
        with_text = bool(body.return_text_in_logprobs)
        if body.stream:
            return EventStream(_stream(services, jobs, with_text))
        return await unless_gone(request, _whole(services, jobs, single, with_text))

    return router


async def _whole(services: Services, jobs: Sequence[Job], single: bool, with_text: bool) -> Response:
    with Run(services, jobs) as run:
        # A router puts the prompt's logprobs of prefill's answer in front of decode's, but only in a single whole one.
        elsewhere = single and services.config.role == "decode"
        answers = [_answer(services, sequence, with_text, with_prompt=not elsewhere) for sequence in await run.finished()]
    return json_response(answers[0] if single else answers)


async def _stream(services: Services, jobs: Sequence[Job], with_text: bool) -> AsyncGenerator[bytes, None]:
    """Every event holds all of a sequence's answer so far; `index` tells the sequences of a batch apart."""
    with Run(services, jobs) as run:
        async for update in run.updates():
            answer = _answer(services, update.sequence, with_text)
            if len(jobs) > 1:
                answer["index"] = update.sequence.index
            yield event(answer)
    yield DONE


# From the body to jobs


def _is_batch(body: GenerateBody) -> bool:
    if body.text is not None:
        return isinstance(body.text, list)
    return bool(body.input_ids) and isinstance(body.input_ids[0], list)  # type: ignore[index]


async def _prompts(services: Services, body: GenerateBody) -> list[list[int]]:
    """Token ids of each prompt."""
    if (body.text is None) == (body.input_ids is None):
        raise bad_request("exactly one of text and input_ids must be given", "text")
    if body.text is not None:
        tokenizer = services.need_tokenizer("text")
        texts = body.text if isinstance(body.text, list) else [body.text]
        if not texts or not all(texts):
            raise bad_request("text is empty", "text")
        return [await tokenizer.encode_async(text) for text in texts]
    assert body.input_ids is not None
    if not body.input_ids:
        raise bad_request("input_ids is empty: there must be at least one token", "input_ids")
    lists = [item for item in body.input_ids if isinstance(item, list)]
    if not lists:
        return [[item for item in body.input_ids if isinstance(item, int)]]
    if len(lists) != len(body.input_ids):
        raise bad_request("input_ids must be a list of token ids or a list of such lists, not a mixture", "input_ids")
    return lists


async def _make_jobs(services: Services, body: GenerateBody) -> list[Job]:
    """The sequences of all prompts: prompt by prompt, n for each."""
    prompts = await _prompts(services, body)
    count = len(prompts)
    plans = [_plan(services, body, values) for values in _spread(_params(body), count, "sampling_params")]
    names = _names(body.rid, count)
    wants = _wants(body, count)
    fields = FieldNames(
        prompt="input_ids" if body.text is None else "text",
        max_tokens="sampling_params.max_new_tokens",
        top_logprobs="top_logprobs_num",
    )
    jobs = [
        job
        for index, input_ids in enumerate(prompts)
        for job in make_jobs(
            names[index],
            input_ids,
            plans[index],
            services.limits,
            fields,
            wants=wants[index],
            priority=body.priority or 0,
            dp_rank=body.routed_dp_rank if body.data_parallel_rank is None else body.data_parallel_rank,
        )
    ]
    return with_rooms(services.config, body, jobs, count)


def _params(body: GenerateBody) -> dict[str, Any] | list[dict[str, Any]]:
    return {} if body.sampling_params is None else body.sampling_params


def _plan(services: Services, body: GenerateBody, values: dict[str, Any]) -> Plan:
    # Routers put this one beside the sampling parameters.
    extra = {"no_stop_trim": True} if body.no_stop_trim else {}
    defaults = services.config.default_sampling
    plan = make_plan({**values, **extra}, services.limits, defaults=defaults, prefix="sampling_params.")
    if plan.stops:
        services.need_tokenizer("sampling_params.stop")
    return plan


def _wants(body: GenerateBody, count: int) -> list[Wants]:
    logprobs = _spread(body.return_logprob or False, count, "return_logprob")
    starts = _spread(-1 if body.logprob_start_len is None else body.logprob_start_len, count, "logprob_start_len")
    tops = _spread(body.top_logprobs_num or 0, count, "top_logprobs_num")
    rows = zip(logprobs, tops, starts, strict=True)
    return [Wants(logprobs=logprob, top=top, start=start) for logprob, top, start in rows]


def _spread(value: T | list[T], count: int, param: str) -> list[T]:
    """One value for all prompts, or one for each."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise bad_request(f"{param} has {len(value)} entries for {count} prompts", param)
    return value


def _names(rid: str | list[str] | None, count: int) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(rid, str):
        return [rid] if count == 1 else [f"{rid}_{index}" for index in range(count)]
    return _spread(rid, count, "rid")


# From sequences to answers


def _answer(services: Services, sequence: Generated, with_text: bool, *, with_prompt: bool = True) -> dict[str, Any]:
    """`with_prompt`: with the prompt's logprobs, if they are asked for."""
    meta: dict[str, Any] = {
        "id": sequence.job.name,
        "finish_reason": None if sequence.finish is None else finish_reason(sequence.finish, len(sequence.output_ids)),
        "prompt_tokens": len(sequence.job.input_ids),
        "completion_tokens": len(sequence.output_ids),
        "cached_tokens": sequence.cached_tokens,
        "dp_rank": sequence.dp_rank,
        "e2e_latency": sequence.latency(),
    }
    if sequence.job.wants.logprobs:
        meta |= _logprobs(services, sequence, sequence.prompt_logprobs if with_prompt else [], with_text)
    return {"text": sequence.text, "output_ids": sequence.output_ids, "meta_info": meta}


def finish_reason(finish: Finish, num_tokens: int) -> dict[str, Any]:
    """SGLang's form: the type, and what it was."""
    if finish.kind == "length":
        return {"type": "length", "length": num_tokens}
    if finish.kind == "abort":
        return {"type": "abort", "message": finish.message or "aborted"}
    return {"type": "stop", "matched": finish.matched}


def _logprobs(services: Services, sequence: Generated, prompt: Sequence[TokenLogprobs], with_text: bool) -> dict[str, Any]:
    """Triples [logprob, token id, text or null]; for the top ones a list of triples per position."""

    def triple(token_id: int, logprob: float | None) -> list[Any]:
        tokenizer = services.tokenizer
        return [logprob, token_id, tokenizer.token_text(token_id) if with_text and tokenizer is not None else None]

    def tops(rows: Sequence[TokenLogprobs]) -> list[list[list[Any]] | None]:
        return [[triple(*top) for top in row.top] or None for row in rows]

    meta: dict[str, Any] = {
        "input_token_logprobs": [triple(row.token_id, row.logprob) for row in prompt],
        "output_token_logprobs": [triple(row.token_id, row.logprob) for row in sequence.logprobs],
    }
    if sequence.job.wants.top:
        meta["input_top_logprobs"] = tops(prompt)
        meta["output_top_logprobs"] = tops(sequence.logprobs)
    return meta
