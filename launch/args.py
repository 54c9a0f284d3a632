"""Reads the command line into a `ServerConfig`. The flags themselves are data, in `launch/flags.py`.

Knows no process. A flag of a capability that is not built yet is accepted at its off value and refused otherwise, all
of them in one message: nothing is silently ignored. An unknown flag is refused with the nearest known one.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import NoReturn

from moesaic.launch.config import ServerConfig
from moesaic.launch.errors import ConfigError
from moesaic.launch.flag_kinds import Flag, LaterFlag
from moesaic.launch.flags import FLAG_GROUPS, LATER_FLAGS

DEFAULTS = {field.name: field.default for field in fields(ServerConfig) if field.default is not MISSING}


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as ConfigError: the command line decides how they look."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of `moesaic serve`, in groups."""
    for title, flags in FLAG_GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add_flag(group, flag)
    later = parser.add_argument_group("not built yet", "accepted at these values and refused otherwise")
    for late in LATER_FLAGS:
        help_text = late.capability + (f" [{late.off[0]}]" if late.off else "")
        if late.off is None:
            later.add_argument(late.name, action="store_true", help=help_text)
        else:
            later.add_argument(late.name, nargs="+", metavar="V", help=help_text)


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    required = flag.field not in DEFAULTS
    default = DEFAULTS.get(flag.field)
    if flag.kind is None:
        group.add_argument(*flag.names, action="store_true", help=flag.help)
        return
    shown = f" [{default}]" if default is not None else ""
    group.add_argument(
        *flag.names,
        type=flag.kind,
        choices=flag.choices,
        metavar=flag.metavar,
        required=required,
        default=default,
        nargs="+" if flag.several else None,
        help=flag.help + shown,
    )


def new_parser(prog: str, description: str | None = None) -> argparse.ArgumentParser:
    """A parser that reports errors as ConfigError and knows no abbreviations (a new flag must not change what an old
    one means).
    """
    return _Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.HelpFormatter)


def parse_serve(argv: Sequence[str]) -> ServerConfig:
    """The arguments after `serve` -> ServerConfig. Raises ConfigError for anything wrong; `--help` prints and exits."""
    parser = new_parser("moesaic serve", "Serve a DeepSeek-V3-class model over HTTP.")
    add_serve_flags(parser)
    # Asked first, because argparse's complaint about a missing --model-path would hide a misspelt one.
    _refuse_unknown(argv, parser)
    namespace, extra = parser.parse_known_args(argv)
    if extra:
        raise ConfigError(f"unexpected argument{'s' if len(extra) > 1 else ''}: {' '.join(extra)}")
    _refuse_later(namespace)
    values = {field.name: getattr(namespace, field.name) for field in fields(ServerConfig)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return ServerConfig(**values | {"model_path": resolve_model_path(values["model_path"])})


def resolve_model_path(path: str) -> str:
    """`demo` is the checkpoint that comes with moesaic; anything else is a folder."""
    if path != "demo":
        return path
    from moesaic.launch.demo import CHECKPOINT_DIR

    return str(CHECKPOINT_DIR)


def _refuse_unknown(argv: Sequence[str], parser: argparse.ArgumentParser) -> None:
    known = sorted(option for action in parser._actions for option in action.option_strings)
    given = [argument.split("=", 1)[0] for argument in argv if re.match(r"--[a-zA-Z]", argument)]
    unknown = [flag for flag in given if flag not in known]
    if not unknown:
        return
    hints = []
    for flag in unknown:
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
        hints.append(f"unknown flag {flag}" + (f": did you mean {near[0]}?" if near else ""))
    raise ConfigError("\n".join([*hints, "`moesaic serve --help` lists all flags"]))


def _refuse_later(namespace: argparse.Namespace) -> None:
    refused = [refusal for flag in LATER_FLAGS if (refusal := _refusal(flag, namespace))]
    if refused:
        raise ConfigError("\n".join(["these flags ask for what is not built yet:", *refused]))


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
