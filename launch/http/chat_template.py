"""Chat templates: a conversation becomes a prompt text, by the Jinja template that comes with the checkpoint.

Written against what transformers offers to templates (sandbox, trimmed blocks, `raise_exception`, `strftime_now`,
`tojson`, loop controls, generation blocks). Knows no tokens and no HTTP bodies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, object]


class ChatTemplateError(ValueError):
    """The template refuses this conversation, or is itself wrong."""


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training; for serving its body is what counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML characters, which a model was never trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One compiled template with its special tokens as variables (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"the model's chat template is not valid: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text for `messages`. `extra` are further template variables. Raises ChatTemplateError."""
        variables = {**self._special_tokens, **(extra or {})}
        try:
            return self._template.render(**variables, messages=messages, add_generation_prompt=add_generation_prompt, tools=None)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error

    def render_to_continue(self, messages: Sequence[Message], extra: Mapping[str, object] | None = None) -> str:
        """The prompt text that ends inside the last message, so that the model goes on with it."""
        text = self.render(messages, add_generation_prompt=False, extra=extra)
        last = str(messages[-1].get("content") or "").strip()
        end = text.rfind(last)
        if end < 0:
            raise ChatTemplateError("the chat template changes the last message: it cannot be continued")
        return text[: end + len(last)]


def find_template(folder: Path, settings: Mapping[str, object]) -> str | None:
    """The template's source: chat_template.jinja, else `chat_template` in tokenizer_config.json (a string or a named
    list).
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
