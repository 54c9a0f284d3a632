"""A line chart as inline SVG: thin lines over a light grid, colours by CSS class, a tooltip on every point.

Knows numbers and labels only. The page's style sheet (`html_page.py`) gives the classes their colours in light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 1040, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 44


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. colour: index into the page's palette; None is the muted one, for bounds. dashed: for bounds and for what-ifs."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int | None
    dashed: bool = False

    @property
    def css_class(self) -> str:
        return ("muted" if self.colour is None else f"c{self.colour}") + (" dashed" if self.dashed else "")


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Data to pixels along one axis."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(each) for each in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        fraction = 0.5 if high == low else (value - low) / (high - low)
        return round(self.first + fraction * (self.last - self.first), 1)


def nice_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def balancedness_floor(series: Sequence[Series]) -> float:
    """Where the y axis of a chart of balancednesses begins: a tenth below the lowest, so that differences are seen."""
    lowest = min((min(line.y) for line in series if len(line.y)), default=0.0)
    return max(0.0, math.floor(lowest * 10 - 0.2) / 10)


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, x_ticks: Sequence[float] | None = None, log_x: bool = False
) -> str:
    """Balancednesses (y up to 1.0) over x, with a legend above, as HTML."""
    every_x = [x for line in series for x in line.x]
    x_scale = _Scale(low=min(every_x), high=max(every_x), first=_LEFT, last=WIDTH - _RIGHT, log=log_x)
    y_scale = _Scale(low=balancedness_floor(series), high=1.0, first=HEIGHT - _BOTTOM, last=_TOP)
    ticks = nice_ticks(x_scale.low, x_scale.high, 10) if x_ticks is None else x_ticks
    body = "".join(
        [
            *(_y_tick(y_scale, tick) for tick in nice_ticks(y_scale.low, 1.0, 6)),
            *(_x_tick(x_scale, tick) for tick in ticks),
            f'<text class="axis" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
            f'<text class="axis" transform="translate(13 {(HEIGHT - _BOTTOM + _TOP) / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>",
            *(_line(line, x_scale, y_scale, f"{x_label} {{x:g}}") for line in series),
        ]
    )
    swatch = '<svg width="26" height="8"><line class="{}" x1="1" x2="25" y1="4" y2="4"/></svg>'
    legend = "".join(f"<span>{swatch.format(line.css_class)}{escape(line.name)}</span>" for line in series)
    return f'<div class="legend">{legend}</div><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{body}</svg>'


def _y_tick(scale: _Scale, tick: float) -> str:
    y = scale(tick)
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:.2f}</text>'
    )


def _x_tick(scale: _Scale, tick: float) -> str:
    x, foot = scale(tick), HEIGHT - _BOTTOM
    return (
        f'<line class="tick" x1="{x}" x2="{x}" y1="{foot}" y2="{foot + 4}"/>'
        f'<text x="{x}" y="{foot + 17}" text-anchor="middle">{tick:g}</text>'
    )


def _line(line: Series, x_scale: _Scale, y_scale: _Scale, where: str) -> str:
    points = [(x_scale(x), y_scale(y), x, y) for x, y in zip(line.x, line.y, strict=True)]
    path = " ".join(f"{px},{py}" for px, py, _, _ in points)
    dots = "".join(
        f'<circle cx="{px}" cy="{py}" r="{2.2 if len(points) <= 24 else 1.2}"><title>{escape(line.name)}, '
        f"{escape(where.format(x=x))}: {y:.3f}</title></circle>"
        for px, py, x, y in points
    )
    return f'<g class="{line.css_class}"><polyline points="{path}"/>{dots}</g>'
