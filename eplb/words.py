"""Numbers as people read them."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """1 window, 2 windows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Bytes to three digits, in powers of 1000."""
    value, units = num_bytes, iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.5 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
