"""What the OpenAI APIs have in common: the fields of their bodies that steer generation, and the usage block.

Extensions beyond OpenAI's own fields carry SGLang's names.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from moesaic.launch.http.errors import bad_request
from moesaic.launch.http.job import Priority
from moesaic.launch.http.rooms import RoomFields
from moesaic.launch.http.run import Generated
from moesaic.launch.http.sampling import SHARED, Plan, make_plan
from moesaic.launch.http.services import Services

_CONSTRAINED = ("json_schema", "regex", "ebnf", "structural_tag")


class StreamOptions(msgspec.Struct, kw_only=True):
    """`include_usage`: a last chunk with the usage. `continuous_usage_stats`, as in SGLang and vLLM: in every chunk, so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAiBody(RoomFields, kw_only=True):
    """Fields of both chat and plain completions. Values are checked by sampling.make_plan; types here are only a first
    sieve.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    seed: Any = None
    n: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    ignore_eos: Any = None
    skip_special_tokens: Any = None
    no_stop_trim: Any = None
    min_tokens: Any = None
    max_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    rid: str | None = None
    priority: Priority | None = None
    data_parallel_rank: int | None = None
    routed_dp_rank: int | None = None

    def pinned(self) -> int | None:
        return self.routed_dp_rank if self.data_parallel_rank is None else self.data_parallel_rank

    def stream_usage(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


def refuse_unsupported(body: OpenAiBody) -> None:
    """What would silently change the answer if it were ignored."""
    for name in _CONSTRAINED:
        if getattr(body, name) is not None:
            raise bad_request(f"{name}: constrained decoding is not supported yet", name)
    if body.logit_bias:
        raise bad_request("logit_bias is not supported yet", "logit_bias")
    refuse_format(body.response_format, "response_format")


def refuse_format(value: Mapping[str, Any] | None, param: str) -> None:
    if value is not None and value.get("type") != "text":
        raise bad_request(f"{param}: only the type 'text' works: constrained decoding is not supported yet", param)


def refuse_tools(value: Sequence[object] | None, param: str) -> None:
    if value:
        raise bad_request(f"{param}: tool calls are not supported yet", param)


def refuse_tool_choice(value: object) -> None:
    if value not in (None, "auto", "none"):
        raise bad_request("tool_choice: tool calls are not supported yet", "tool_choice")


def openai_plan(services: Services, body: OpenAiBody, max_tokens: int | None, max_tokens_name: str) -> Plan:
    """The body's sampling fields, checked. Without `max_tokens` the answer may fill the context."""
    values: dict[str, object] = {name: getattr(body, name) for name in SHARED if getattr(body, name) is not None}
    values |= {"max_new_tokens": max_tokens, "min_new_tokens": body.min_tokens}
    names = {"max_new_tokens": max_tokens_name, "min_new_tokens": "min_tokens"}
    plan = make_plan(values, services.limits, defaults=services.config.default_sampling, names=names)
    if plan.stops:
        services.need_tokenizer("stop")
    return plan


def new_name(prefix: str, rid: str | None = None) -> str:
    return rid or f"{prefix}-{uuid.uuid4().hex}"


def usage_so_far(options: StreamOptions, sequences: Sequence[Generated]) -> dict[str, object]:
    """What a chunk before the last says of usage. OpenAI: with include_usage a null."""
    if options.continuous_usage_stats:
        return {"usage": usage(sequences)}
    return {"usage": None} if options.include_usage else {}


def usage(sequences: Sequence[Generated]) -> dict[str, Any]:
    """Token counts; a prompt with n answers counts once."""
    # The n sequences of one prompt share the tuple of its ids.
    prompts = {id(sequence.job.input_ids): len(sequence.job.input_ids) for sequence in sequences}
    prompt_tokens = sum(prompts.values())
    completion_tokens = sum(len(sequence.output_ids) for sequence in sequences)
    cached = sum({id(sequence.job.input_ids): sequence.cached_tokens for sequence in reversed(sequences)}.values())
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
