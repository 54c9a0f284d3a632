"""What a flag is, and what its value may be: the words in which `launch/flags.py` lists the flags. Knows no flag and no parser."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

NumberT = TypeVar("NumberT", int, float)


def positive_int(text: str) -> int:
    """An integer >= 1."""
    return _checked(text, int, lambda value: value >= 1, "an integer of 1 or more")


def rank_number(text: str) -> int:
    """An integer >= 0."""
    return _checked(text, int, lambda value: value >= 0, "an integer of 0 or more")


def port_number(text: str) -> int:
    """A TCP port; 0 is refused, because nobody would know where the server listens."""
    return _checked(text, int, lambda value: 1 <= value <= 65535, "a port in 1..65535")


def chunk_size(text: str) -> int:
    """A number of tokens, or -1 for prompts in one piece."""
    return _checked(text, int, lambda value: value == -1 or value >= 1, "a number of tokens, or -1 for no chunking")


def count_or_any(text: str) -> int:
    """A number of 1 or more, or -1 for no limit."""
    return _checked(text, int, lambda value: value == -1 or value >= 1, "an integer of 1 or more, or -1 for no limit")


def fraction(text: str) -> float:
    """A number in (0, 1]."""
    return _checked(text, float, lambda value: 0 < value <= 1, "a fraction above 0 and up to 1")


def gigabytes(text: str) -> float:
    """A number >= 0, finite."""
    return _checked(text, float, lambda value: 0 <= value < float("inf"), "a number of GB, 0 or more")


def smaller_share(text: str) -> float:
    """A number in [0, 0.5]: what the smaller of two sides may have of the whole."""
    return _checked(text, float, lambda value: 0 <= value <= 0.5, "a share in 0..0.5")


def address(text: str) -> str:
    """HOST:PORT. The ports after it are used as well (see `launch/endpoints.py`)."""
    host, colon, port = text.rpartition(":")
    if not (colon and host):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    port_number(port)
    return text


def _checked(text: str, kind: type[NumberT], legal: Callable[[NumberT], bool], wanted: str) -> NumberT:
    value: NumberT | None = None
    with contextlib.suppress(ValueError):
        value = kind(text)
    if value is None or not legal(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag.

    The first of `names` gives the ServerConfig field. `kind` None means a switch that turns the field on. `several`: takes one
    value or more, a tuple in the ServerConfig.
    """

    names: tuple[str, ...]
    help: str
    kind: Callable[[str], Any] | None = str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    several: bool = False

    @property
    def field(self) -> str:
        return self.names[0].removeprefix("--").replace("-", "_")


def flag(name: str, help: str, kind: Callable[[str], Any] = str, metavar: str | None = None, aliases: tuple[str, ...] = ()) -> Flag:
    """A flag with a value. `metavar`: what the help calls the value."""
    return Flag(names=(name, *aliases), help=help, kind=kind, metavar=metavar or ("N" if kind is not str else None))


def choice(name: str, help: str, *choices: str) -> Flag:
    """A flag whose value is one of these."""
    return Flag(names=(name,), help=help, choices=choices)


def switch(name: str, help: str, *aliases: str) -> Flag:
    """A flag without a value."""
    return Flag(names=(name, *aliases), help=help, kind=None)


@dataclass(frozen=True, kw_only=True)
class LaterFlag:
    """A flag of a capability that is not built yet.

    `off` are the values that ask for nothing; None: a switch, off by absence.
    """

    name: str
    capability: str
    off: tuple[str, ...] | None


def later(capability: str, **flags: tuple[str, ...] | None) -> tuple[LaterFlag, ...]:
    """The flags of one capability, as name=values that ask for nothing."""
    return tuple(LaterFlag(name="--" + name.replace("_", "-"), capability=capability, off=off) for name, off in flags.items())
