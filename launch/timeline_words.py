"""Times and shares of a timeline as people read them."""

from __future__ import annotations


def duration(microseconds: float) -> str:
    """12.3 us, 4.56 ms, 7.89 s."""
    for limit, unit, digits in ((1e3, "us", 1), (1e6, "ms", 2)):
        if microseconds < limit:
            return f"{microseconds / limit * 1e3:.{digits}f} {unit}"
    return f"{microseconds / 1e6:.2f} s"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def number(value: int | None) -> str:
    return "–" if value is None else f"{value}"
