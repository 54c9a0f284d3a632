"""The resolution report: for each capability what was chosen, what was refused and why. Data and its two renderings.

Knows nothing of how a choice is made. Terms: a downgrade is a choice nobody asked for, made because a better candidate
was refused; `accept` is the flag that asks for the lesser choice in so many words, which is what `--strict` wants to
see.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesaic.launch.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One row. `refused` holds (candidate, reason) pairs, best candidate first."""

    capability: str
    chosen: str
    refused: tuple[tuple[str, str], ...] = ()
    downgrade: bool = False
    accept: str = ""

    def __post_init__(self) -> None:
        assert not self.downgrade or (self.refused and self.accept), "a downgrade has a reason and a way to accept it"


def refuse_downgrades(choices: Iterable[Choice]) -> None:
    """`--strict`: raise one ConfigError that lists every automatic downgrade and the flag that would ask for it."""
    lines = [
        f"  {choice.capability}: {candidate} refused ({reason}), so {choice.chosen}; to accept it: {choice.accept}"
        for choice in choices
        if choice.downgrade
        for candidate, reason in choice.refused[:1]
    ]
    if lines:
        raise ConfigError("\n".join(["--strict allows no automatic downgrade:", *lines]))


def report_rows(choices: Iterable[Choice]) -> list[dict[str, Any]]:
    """The report as JSON-able rows, for /server_info."""
    return [
        {
            "capability": choice.capability,
            "chosen": choice.chosen,
            "refused": [{"candidate": candidate, "reason": reason} for candidate, reason in choice.refused],
            "automatic_downgrade": choice.downgrade,
        }
        for choice in choices
    ]


def render_report(choices: Iterable[Choice]) -> Table:
    """The report as a table for the terminal."""
    from rich.table import Table

    table = Table()
    for column in ("capability", "chosen", "refused, and why", "automatic downgrade"):
        table.add_column(column)
    for choice in choices:
        refused = "\n".join(f"{candidate}: {reason}" for candidate, reason in choice.refused) or "-"
        table.add_row(choice.capability, choice.chosen, refused, "yes" if choice.downgrade else "no")
    return table
