"""Command lines written for SGLang or vLLM: what is taken as it is, what is refused by name, and what the server says about it.

Nothing is ignored in silence: a flag is one of ours, a spelling of one of ours, one that asks for what is so anyway (said in a
note), or refused with the reason. The tables are in `launch/foreign_flags.py`. Knows no parser and no config.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from moesaic.launch.errors import ConfigError
from moesaic.launch.foreign_flags import (
    ENVIRONMENT,
    FAMILIES,
    FOREIGN_PREFIXES,
    INSTEAD,
    READ_VARIABLES,
    SATISFIED,
    TRANSLATED,
)


def name_of(argument: str) -> str:
    """`--flag` of `--flag=value`."""
    return argument.split("=", 1)[0]


def translate(argv: Sequence[str]) -> list[str]:
    """The same command line in our own flags. ConfigError for a spelling beside the flag that it stands for."""
    arguments: list[str] = []
    rest = iter(argv)
    for argument in rest:
        name, _, value = argument.partition("=")
        ours = TRANSLATED.get(name)
        if ours is None:
            arguments.append(argument)
            continue
        _refuse_both(name, ours, argv)
        if "{}" in ours:
            value = value or next(rest, "")
        arguments += [value if part == "{}" else part for part in ours]
    return arguments


def _refuse_both(name: str, ours: tuple[str, ...], argv: Sequence[str]) -> None:
    """A switch may be given twice, a value may not."""
    valued = {flag for flag, value in itertools.pairwise(ours) if not value.startswith("--")}
    if both := valued & set(map(name_of, argv)):
        raise ConfigError(f"{name} stands for {' '.join(ours).format('N')}: leave it or {min(both)} out")


def explain(flag: str) -> str | None:
    """Why a flag of SGLang's or vLLM's is refused, and what to write instead; None for a name that neither has."""
    if flag in INSTEAD:
        return INSTEAD[flag]
    name = flag.removeprefix("--")
    return next((reason for pattern, reason in FAMILIES if re.match(pattern, name)), None)


def flag_notes(argv: Iterable[str]) -> list[str]:
    """What to say of flags that were taken although nothing had to be done for them."""
    given = dict.fromkeys(map(name_of, argv))
    return [f"{flag}: {SATISFIED[flag]}" for flag in given if flag in SATISFIED]


def environment_notes(environ: Mapping[str, str]) -> list[str]:
    """What to say of variables that SGLang or vLLM would read and nobody reads here."""
    unread = sorted(name for name in environ if name.startswith(FOREIGN_PREFIXES) and name not in READ_VARIABLES)
    notes = [f"{name}={environ[name]} is not read: {ENVIRONMENT[name]}" for name in unread if name in ENVIRONMENT]
    others = [name for name in unread if name not in ENVIRONMENT]
    return [*notes, f"not read: {', '.join(others)}"] if others else notes
