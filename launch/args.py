"""Reads the command line into a `ServerConfig`. The flags themselves are data, in `launch/flags.py`.

Knows no process. A flag of a capability that is not built yet is accepted at its off value and refused otherwise; one of
SGLang's or vLLM's is taken or refused as `launch/foreign.py` says; a name that nobody knows is refused with the nearest known one.
All that is wrong comes in one message.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from moesaic.launch.config import ServerConfig
from moesaic.launch.errors import ConfigError
from moesaic.launch.flag_kinds import Flag, LaterFlag
from moesaic.launch.flags import FLAG_GROUPS, LATER_FLAGS
from moesaic.launch.foreign import explain, name_of, translate
from moesaic.launch.foreign_flags import SATISFIED, VALUE_HINTS

DEFAULTS = {field.name: field.default for field in fields(ServerConfig) if field.default is not MISSING}


SHOWN_LATER = 6
"""How many of the flags that are not built `--help` lists; the others are SGLang's tuning at its defaults."""


MISSPELT = 0.94
"""How alike a name is to one of ours that is meant; no flag of SGLang's comes that close."""


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as ConfigError: the command line decides how they look. `wrong`: values that were refused."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.wrong: list[str] = []

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _add_serve_flags(parser: _Parser) -> None:
    """All flags of `moesaic serve`, in groups."""
    for title, flags in FLAG_GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add_flag(group, flag, parser.wrong)
    later = parser.add_argument_group("not built yet", "accepted at these values and refused otherwise")
    for index, late in enumerate(LATER_FLAGS):
        shown = late.capability + (f" [{late.off[0]}]" if late.off else "")
        help_text = shown if index < SHOWN_LATER else argparse.SUPPRESS
        if late.off is None:
            later.add_argument(late.name, action="store_true", help=help_text)
        else:
            later.add_argument(late.name, nargs="+", metavar="V", help=help_text)
    for name in SATISFIED:
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)


def _add_flag(group: argparse._ArgumentGroup, flag: Flag, wrong: list[str]) -> None:
    default = DEFAULTS.get(flag.field)
    if flag.kind is None:
        group.add_argument(*flag.names, action="store_true", help=flag.help)
        return
    shown = f" [{default}]" if default is not None else ""
    group.add_argument(
        *flag.names,
        type=_reader(flag, flag.kind, wrong),
        metavar=f"{{{','.join(flag.choices)}}}" if flag.choices else flag.metavar,
        default=default,
        nargs="+" if flag.several else None,
        help=flag.help + shown,
    )


def _reader(flag: Flag, kind: Callable[[str], Any], wrong: list[str]) -> Callable[[str], Any]:
    """Reads a value; what is wrong with it goes to `wrong`, so that a person hears of everything at once."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except argparse.ArgumentTypeError as error:
            wrong.append(f"{flag.names[0]}: {error}")
            return None
        if flag.choices and str(value) not in flag.choices:
            hint = VALUE_HINTS.get(flag.names[0])
            wrong.append(f"{flag.names[0]} {text}: choose from {', '.join(flag.choices)}" + (f" ({hint})" if hint else ""))
        return value

    return read


def new_parser(prog: str, description: str | None = None) -> _Parser:
    """A parser that reports errors as ConfigError and knows no abbreviations (a new flag must not change what an old
    one means).
    """
    return _Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.HelpFormatter)


def parse_serve(argv: Sequence[str]) -> ServerConfig:
    """The arguments after `serve` -> ServerConfig. Raises ConfigError for anything wrong; `--help` prints and exits."""
    parser = new_parser("moesaic serve", "Serve a DeepSeek-V3-class model over HTTP.")
    parser.usage = "moesaic serve --model-path DIR [flags]"
    parser.epilog = "SGLang's other flags are taken where they ask for what is so anyway, or refused by name with what to do."
    _add_serve_flags(parser)
    arguments = translate(argv)
    problems = _unknown(arguments, parser)
    try:
        namespace, extra = parser.parse_known_args(arguments)
    except ConfigError as error:
        raise ConfigError("\n".join(problems) or str(error)) from None
    problems += [*parser.wrong, *_later(namespace)]
    if not problems:
        problems += _missing_or_unexpected(namespace, extra)
    if problems:
        raise ConfigError("\n".join(problems))
    values = {field.name: getattr(namespace, field.name) for field in fields(ServerConfig)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return ServerConfig(**values | {"model_path": resolve_model_path(values["model_path"])})


def resolve_model_path(path: str) -> str:
    """`demo` is the checkpoint that comes with moesaic; anything else is a folder."""
    if path != "demo":
        return path
    from moesaic.launch.demo import CHECKPOINT_DIR

    return str(CHECKPOINT_DIR)


def _unknown(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """One line for each flag that the parser doesn't know, and what to do."""
    known = sorted(option for action in parser._actions for option in action.option_strings)
    given = dict.fromkeys(name_of(argument) for argument in argv if re.match(r"--?[a-zA-Z]", argument))
    return [_why_unknown(flag, known) for flag in given if flag not in known]


def _why_unknown(flag: str, known: Sequence[str]) -> str:
    # A slip of the finger in a name of ours first: families of foreign names begin alike.
    near = _nearest(flag, known, MISSPELT)
    if near is None and (reason := explain(flag)) is not None:
        return f"{flag}: {reason}"
    near = near or _nearest(flag, known, 0.6)
    return f"unknown flag {flag}: " + (f"did you mean {near}?" if near else "`moesaic serve --help` lists all flags")


def _nearest(flag: str, known: Sequence[str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches("--" + flag.lstrip("-").replace("_", "-"), known, n=1, cutoff=cutoff)), None)


def _missing_or_unexpected(namespace: argparse.Namespace, extra: Sequence[str]) -> list[str]:
    words = f"unexpected argument{'s' if len(extra) > 1 else ''}: {' '.join(extra)}"
    if namespace.model_path is not None:
        return [words] if extra else []
    if extra and not extra[0].startswith("-"):
        return [f"{words}; did you mean --model-path {extra[0]}?"]
    return ["--model-path is missing: a folder with a model, or `demo`, the small one that comes along"]


def _later(namespace: argparse.Namespace) -> list[str]:
    refused = [refusal for flag in LATER_FLAGS if (refusal := _refusal(flag, namespace))]
    return ["these flags ask for what is not built yet:", *refused] if refused else []


def _refusal(flag: LaterFlag, namespace: argparse.Namespace) -> str | None:
    value: bool | list[str] | None = getattr(namespace, flag.name.removeprefix("--").replace("-", "_"))
    if value is None or value is False:
        return None
    if value is True:
        return f"  {flag.name}: {flag.capability} is not built yet; leave it out"
    assert flag.off is not None
    if len(value) == 1 and value[0] in flag.off:
        return None
    remedy = f"leave it out, or use {flag.name} {flag.off[0]}" if flag.off else "leave it out"
    return f"  {flag.name} {' '.join(value)}: {flag.capability} is not built yet; {remedy}"
