"""Flags that don't go together, collected so that a person hears of all of them at once.

Knows no flag. A rule yields a `Conflict` for each thing it finds; `refuse` turns all of them into one ConfigError.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moesaic.launch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Flags that don't go together: `flags` as typed, `reason`, and the `remedy`."""

    flags: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.flags}: {self.reason}; {self.remedy}"


def refuse(conflicts: Iterable[Conflict]) -> None:
    """Raise one ConfigError that lists all conflicts, if there are any."""
    lines = [f"  {conflict}" for conflict in conflicts]
    if lines:
        raise ConfigError("\n".join(["these flags conflict:", *lines]))


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [value for value in range(1, number + 1) if number % value == 0]


def nearest(flag: str, legal: list[int], value: int, *, otherwise: str = "no value is legal") -> str:
    """The legal values just below and just above, as a remedy."""
    below = [candidate for candidate in legal if candidate < value][-1:]
    above = [candidate for candidate in legal if candidate > value][:1]
    candidates = [f"{flag} {candidate}" for candidate in (*below, *above)]
    return f"nearest legal: {' or '.join(candidates)}" if candidates else otherwise
