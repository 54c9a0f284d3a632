"""Checking sampling parameters: a request's words become messages.SamplingParams plus what only the HTTP side needs.

The native names are SGLang's; OpenAI's bodies are translated to them first, with `names` to blame the field the user
wrote. Every refusal is a 400 naming the field. Knows neither prompts nor ranks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.launch.engine.messages import SamplingParams
from moesaic.launch.http.errors import ApiError, bad_request

DEFAULT_MAX_NEW_TOKENS = 128
GREEDY_BELOW = 1e-6
# Logits are divided by it: below, they leave what a float32 can hold.
MIN_REPETITION_PENALTY = 1e-6
MAX_SEQUENCES = 128
MAX_STOPS = 64
MAX_STOP_BYTES = 64 << 10

CONSTRAINED = frozenset({"json_schema", "regex", "ebnf", "structural_tag", "stop_regex"})
# Known to SGLang, without a meaning here unless they ask for something.
UNSUPPORTED = frozenset({"custom_params", "logit_bias", "stream_interval"})
# Under the same name in OpenAI's bodies.
SHARED = (
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "seed", "n"),
    *("stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "no_stop_trim"),
)
SUPPORTED = frozenset({*SHARED, "sampling_seed", "max_new_tokens", "min_new_tokens", "spaces_between_special_tokens"})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to generate, checked. The number of new tokens is settled once the prompt's length is known (job.fit_plan):
    `max_new_tokens` None fills the context, and a default (one nobody asked for) gives way to the context's length.
    """

    params: SamplingParams
    max_new_tokens: int | None
    max_is_default: bool = False
    n: int = 1
    stops: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    no_stop_trim: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What the checks need to know of the model and the server. `kv_tokens`: what the KV cache of one DP rank holds."""

    vocab_size: int
    context_length: int
    kv_tokens: int
    eos_token_ids: tuple[int, ...]

    @property
    def max_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        return min(self.context_length, self.kv_tokens)

    def in_words(self) -> str:
        if self.kv_tokens < self.context_length:
            room = f"the KV cache of a DP rank holds {self.kv_tokens} tokens"
            return f"{room} (--max-total-tokens and --mem-fraction-static decide that)"
        return f"the context length is {self.context_length} tokens"


class _Reader:
    """Typed access to a mapping; blames the name that the user wrote."""

    def __init__(self, values: Mapping[str, object], names: Mapping[str, str], prefix: str) -> None:
        self._values = values
        self._names = names
        self._prefix = prefix

    def blame(self, key: str, message: str) -> ApiError:
        name = self._prefix + self._names.get(key, key)
        return bad_request(f"{name} {message}", param=name)

    def get(self, key: str) -> object:
        return self._values.get(key)

    def number(self, key: str, default: float, low: float, high: float, *, open_low: bool = False) -> float:
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.blame(key, f"must be a number, got {_shown(value)}")
        inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
        if not inside:
            above = f"above {low:g}" if open_low else f"at least {low:g}"
            limit = "finite" if math.isinf(high) else f"at most {high:g}"
            raise self.blame(key, f"must be {above} and {limit}, got {_shown(value)}")
        return float(value)

    def integer(self, key: str, default: int, low: int, high: int | None = None) -> int:
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.blame(key, f"must be an integer, got {_shown(value)}")
        if value < low or (high is not None and value > high):
            limit = f"at least {low}" if high is None else f"in [{low}, {high}]"
            raise self.blame(key, f"must be {limit}, got {_shown(value)}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.blame(key, f"must be true or false, got {_shown(value)}")
        return value

    def stops(self) -> tuple[str, ...]:
        value = self._values.get("stop")
        if value is None:
            return ()
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise self.blame("stop", f"must be a string or a list of strings, got {_shown(value)}")
        if len(stops) > MAX_STOPS:
            raise self.blame("stop", f"may hold at most {MAX_STOPS} strings, got {len(stops)}")
        size = sum(len(stop.encode()) for stop in stops)
        if size > MAX_STOP_BYTES:
            raise self.blame("stop", f"may hold at most {MAX_STOP_BYTES} bytes in all, got {size}")
        return tuple(dict.fromkeys(stop for stop in stops if stop))

    def stop_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        value = self._values.get("stop_token_ids")
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > 1024:
            raise self.blame("stop_token_ids", f"must be a list of at most 1024 token ids, got {_shown(value)}")
        for token_id in value:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise self.blame("stop_token_ids", f"must hold token ids in [0, {vocab_size}), got {_shown(token_id)}")
        return tuple(value)


def _shown(value: object) -> str:
    """A value in a message: short, whatever was sent."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_keys(values: Mapping[str, object], prefix: str) -> None:
    """Refuse what is unknown or not supported; a router's nulls and empties are no request for anything."""
    for key, value in values.items():
        if key in SUPPORTED:
            continue
        if key in CONSTRAINED:
            if value is not None:
                raise bad_request(f"{prefix}{key}: constrained decoding is not supported yet", prefix + key)
        elif key in UNSUPPORTED:
            if value:
                raise bad_request(f"{prefix}{key} is not supported yet", prefix + key)
        else:
            raise bad_request(f"{prefix}{key} is not a sampling parameter", prefix + key, "unknown_parameter")


def make_plan(
    values: Mapping[str, object],
    limits: ModelLimits,
    *,
    defaults: Mapping[str, object] | None = None,
    names: Mapping[str, str] | None = None,
    prefix: str = "",
) -> Plan:
    """Check native `values` (`defaults` where they are silent); `names` and `prefix` say what to call a field in
    refusals.
    """
    check_keys(values, prefix)
    reader = _Reader(_with_defaults(values, defaults or {}), names or {}, prefix)
    unlimited = "max_new_tokens" in values and values["max_new_tokens"] is None
    max_new_tokens = reader.integer("max_new_tokens", DEFAULT_MAX_NEW_TOKENS, 0)
    params = _params(reader, limits, max_new_tokens)
    if not unlimited and params.min_new_tokens > max_new_tokens:
        raise reader.blame("min_new_tokens", f"must be in [0, max_new_tokens = {max_new_tokens}]")
    reader.boolean("spaces_between_special_tokens", True)
    return Plan(
        params=params,
        max_new_tokens=None if unlimited else max_new_tokens,
        max_is_default="max_new_tokens" not in values,
        n=reader.integer("n", 1, 1, MAX_SEQUENCES),
        stops=reader.stops(),
        skip_special_tokens=reader.boolean("skip_special_tokens", True),
        no_stop_trim=reader.boolean("no_stop_trim", False),
    )


def _with_defaults(values: Mapping[str, object], defaults: Mapping[str, object]) -> dict[str, object]:
    """A null in the request also means: the default."""
    known = {key: value for key, value in defaults.items() if key in SUPPORTED}
    return known | {key: value for key, value in values.items() if value is not None or key not in known}


def _params(reader: _Reader, limits: ModelLimits, max_new_tokens: int) -> SamplingParams:
    temperature = reader.number("temperature", 1.0, 0.0, math.inf)
    stop_ids = reader.stop_token_ids(limits.vocab_size)
    if not reader.boolean("ignore_eos", False):
        stop_ids = tuple(dict.fromkeys((*limits.eos_token_ids, *stop_ids)))
    return SamplingParams(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=reader.number("top_p", 1.0, 0.0, 1.0, open_low=True),
        top_k=_top_k(reader),
        min_p=reader.number("min_p", 0.0, 0.0, 1.0),
        frequency_penalty=reader.number("frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=reader.number("presence_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=reader.number("repetition_penalty", 1.0, MIN_REPETITION_PENALTY, 2.0),
        seed=_seed(reader),
        max_new_tokens=max_new_tokens,
        min_new_tokens=reader.integer("min_new_tokens", 0, 0),
        stop_token_ids=stop_ids,
    )


def _top_k(reader: _Reader) -> int:
    top_k = reader.integer("top_k", -1, -1)
    if top_k == 0:
        raise reader.blame("top_k", "must be -1 (all tokens) or at least 1, got 0")
    # Above the vocabulary it means all, and must not overflow what the message can carry.
    return top_k if top_k < 1 << 30 else -1


def _seed(reader: _Reader) -> int:
    key = "seed" if reader.get("seed") is not None else "sampling_seed"
    if reader.get(key) is None:
        return random.getrandbits(62)
    return reader.integer(key, 0, -(1 << 63), (1 << 63) - 1)
