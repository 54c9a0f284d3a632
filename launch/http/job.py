"""One sequence to generate, with everything checked against the model: the last step before it is sent to a rank.

Knows the limits of the model and of the server; knows no API's body.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import msgspec

from moesaic.launch.engine.messages import Bootstrap, GenerateRequest
from moesaic.launch.http.errors import bad_request
from moesaic.launch.http.sampling import ModelLimits, Plan

MAX_TOP_LOGPROBS = 64
# As large as the message to the ranks can carry.
Priority = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


@dataclass(frozen=True, kw_only=True)
class Wants:
    """Which log probabilities are asked for. `start` -1: none of the prompt; else from that prompt position on."""

    logprobs: bool = False
    top: int = 0
    start: int = -1


@dataclass(frozen=True, kw_only=True)
class Job:
    """A sequence to generate. `name` is what /abort_request calls it; `dp_rank` pins it; `bootstrap`: its room, on an instance with
    a role.
    """

    name: str
    input_ids: tuple[int, ...]
    plan: Plan
    wants: Wants = field(default_factory=Wants)
    priority: int = 0
    dp_rank: int | None = None
    bootstrap: Bootstrap | None = None

    def request(self) -> GenerateRequest:
        return GenerateRequest(
            rid=0,
            input_ids=self.input_ids,
            sampling=self.plan.params,
            priority=self.priority,
            return_logprob=self.wants.logprobs,
            top_logprobs_num=self.wants.top,
            logprob_start_len=self.wants.start,
            bootstrap=self.bootstrap,
        )


@dataclass(frozen=True, kw_only=True)
class FieldNames:
    """What the API at hand calls the fields that can be at fault here."""

    prompt: str
    max_tokens: str
    top_logprobs: str = "top_logprobs"


def check_ids(input_ids: Sequence[int], limits: ModelLimits, param: str) -> tuple[int, ...]:
    """Non-empty and inside the vocabulary."""
    if not input_ids:
        raise bad_request(f"{param} is empty: there must be at least one token", param)
    low, high = min(input_ids), max(input_ids)
    if low < 0 or high >= limits.vocab_size:
        wrong = low if low < 0 else high
        raise bad_request(f"{param} holds token id {wrong}, which is outside [0, {limits.vocab_size})", param)
    return tuple(input_ids)


def fit_plan(plan: Plan, num_prompt_tokens: int, limits: ModelLimits, names: FieldNames) -> Plan:
    """`plan` with its number of new tokens resolved; refused when prompt and new tokens exceed the context or
    the KV cache.
    """
    room = limits.max_tokens - num_prompt_tokens
    if room < 1:
        raise bad_request(
            f"{names.prompt} has {num_prompt_tokens} tokens, but {limits.in_words()}, and at least one is needed for the answer",
            names.prompt,
            "context_length_exceeded",
        )
    wanted = room if plan.max_new_tokens is None else plan.max_new_tokens
    if plan.max_is_default:
        wanted = min(wanted, room)
    if wanted > room:
        raise bad_request(
            f"{names.prompt} has {num_prompt_tokens} tokens and {names.max_tokens} is {wanted}: together "
            f"{num_prompt_tokens + wanted}, but {limits.in_words()}",
            names.max_tokens,
            "context_length_exceeded",
        )
    params = msgspec.structs.replace(plan.params, max_new_tokens=wanted, min_new_tokens=min(plan.params.min_new_tokens, wanted))
    return replace(plan, params=params, max_new_tokens=wanted)


def check_wants(wants: Wants, num_prompt_tokens: int, names: FieldNames) -> Wants:
    if not 0 <= wants.top <= MAX_TOP_LOGPROBS:
        raise bad_request(f"{names.top_logprobs} must be in [0, {MAX_TOP_LOGPROBS}], got {wants.top}", names.top_logprobs)
    if not -1 <= wants.start <= num_prompt_tokens:
        param = "logprob_start_len"
        raise bad_request(f"{param} must be in [-1, {num_prompt_tokens} (prompt tokens)], got {wants.start}", param)
    return wants if wants.logprobs else Wants()


def make_jobs(
    name: str,
    input_ids: Sequence[int],
    plan: Plan,
    limits: ModelLimits,
    names: FieldNames,
    *,
    wants: Wants | None = None,
    priority: int = 0,
    dp_rank: int | None = None,
) -> list[Job]:
    """The `plan.n` sequences for one prompt, all checked. Their seeds differ, else they would all be equal."""
    ids = check_ids(input_ids, limits, names.prompt)
    fitted = fit_plan(plan, len(ids), limits, names)
    checked = check_wants(wants or Wants(), len(ids), names)
    return [
        Job(name=name, input_ids=ids, plan=_seeded(fitted, index), wants=checked, priority=priority, dp_rank=dp_rank)
        for index in range(plan.n)
    ]


def _seeded(plan: Plan, index: int) -> Plan:
    if index == 0:
        return plan
    # Wraps around inside int64.
    seed = (plan.params.seed + index + (1 << 63)) % (1 << 64) - (1 << 63)
    return replace(plan, params=msgspec.structs.replace(plan.params, seed=seed))
