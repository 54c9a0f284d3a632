"""A timeline as a PNG picture, by matplotlib: the optional extra `report`."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.overlap.timeline_picture import Bar, Picture, PictureRow, fitted

_DPI = 150
_MICRO_BATCHES = ("#c2410c", "#1d4ed8")
_MUTED, _ALARM, _FIELD, _INK = "#6b7280", "#dc2626", "#f3f4f6", "#1c2330"
_WAIT = {"facecolor": "white", "edgecolor": _MUTED, "hatch": "/////", "linewidth": 0.4, "zorder": 3}
_WIDTH = 13.0
_LANE, _CPU, _GAP, _RANK_GAP = 1.0, 0.7, 0.16, 0.6
_OPEN = 0.13
_INCHES_PER_LANE = 0.3
_CHARACTERS = 190
"""Of a label, in the width of the axes."""
_STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False, "hatch.linewidth": 0.7}


class MissingReportExtra(ValueError):  # noqa: N818 - reads as what is wrong
    """PNG was asked for where matplotlib isn't installed."""


def save_timeline_png(pictures: Sequence[Picture], path: str | Path, *, title: str) -> None:
    """The pictures below each other. Raises MissingReportExtra without matplotlib."""
    # By name, so that neither importing this file nor checking its types needs the package.
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise MissingReportExtra("a PNG needs matplotlib: pip install 'moesaic[report]'") from error
    heights = [_INCHES_PER_LANE * _height(picture) + 0.75 for picture in pictures]
    with matplotlib.rc_context(_STYLE):
        figure = importlib.import_module("matplotlib.figure").Figure(
            figsize=(_WIDTH, sum(heights) + 0.7), layout="constrained", facecolor="white"
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
        every_axes = figure.subplots(len(pictures), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, picture in zip(every_axes, pictures, strict=True):
            _draw(axes, picture)
        figure.legend(handles=_legend(), loc="outside lower left", ncols=4)
        figure.savefig(path, dpi=_DPI)


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One picture's axes. unit: microseconds of a tick's unit; characters_per_unit: of a bar's label."""

    axes: Any
    unit: float
    characters_per_unit: float

    def draw_row(self, row: PictureRow, y: float, lane: float) -> None:
        light = row.label == "CPU"
        groups: dict[tuple[int, int | None, bool], list[Bar]] = defaultdict(list)
        for bar in row.bars:
            groups[bar.lane, bar.micro_batch, bar.wait].append(bar)
            self._draw_label(bar, y + (bar.lane + 0.5) * lane, light=light)
        for (on_lane, micro_batch, wait), bars in groups.items():
            colour = _MUTED if micro_batch is None else _MICRO_BATCHES[micro_batch % 2]
            style = _WAIT if wait else {"facecolor": colour, "alpha": 0.42 if light else 1.0, "zorder": 2}
            self.draw_boxes([(bar.start_us, bar.end_us) for bar in bars], y + on_lane * lane, lane, **style)
        self.draw_boxes(row.exposed_us, y + row.num_lanes * lane - _OPEN, _OPEN, facecolor=_ALARM, zorder=4)

    def draw_boxes(self, spans_us: Sequence[tuple[float, float]], y: float, height: float, **style: Any) -> None:
        """One collection for all: thousands of separate boxes would take a minute."""
        boxes = [(start / self.unit, self._width(start, end)) for start, end in spans_us]
        self.axes.broken_barh(boxes, (y, height), **{"linewidth": 0, **style})

    def _width(self, start: float, end: float) -> float:
        """Neighbours are told apart by a seam; between narrow ones it would look like idle time."""
        width = (end - start) / self.unit
        seam = 0.1 / self.characters_per_unit
        return width - seam if width > 8 * seam else width

    def _draw_label(self, bar: Bar, y: float, *, light: bool) -> None:
        label = fitted(bar.label, int((bar.end_us - bar.start_us) / self.unit * self.characters_per_unit) - 1)
        if label:
            text = {"ha": "center", "va": "center", "fontsize": 7, "color": _INK if light else "white", "zorder": 2.5}
            self.axes.text((bar.start_us + bar.end_us) / 2 / self.unit, y, label, clip_on=True, **text)


def _draw(axes: Any, picture: Picture) -> None:
    start, end = picture.window_us
    end = max(end, start + 1)
    unit, name = (1000.0, "ms") if end - start >= 2000 else (1.0, "us")
    panel = _Panel(axes=axes, unit=unit, characters_per_unit=_CHARACTERS / (end - start) * unit)
    ticks: list[tuple[float, str]] = []
    y, rank = 0.0, picture.rows[0].rank
    for row in picture.rows:
        if row.rank != rank:
            rank, y = row.rank, y + _RANK_GAP
        lane = _CPU if row.label == "CPU" else _LANE
        height = row.num_lanes * lane
        panel.draw_boxes([(start, end)], y, height, facecolor=_FIELD, zorder=0)
        panel.draw_row(row, y, lane)
        ticks.append((y + height / 2, f"rank {row.rank}   CPU" if row.label == "CPU" else row.label))
        y += height + _GAP
    axes.set(xlim=(start / unit, end / unit), ylim=(y, -_GAP), xlabel=name)
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(picture.title)


def _height(picture: Picture) -> float:
    """In lanes."""
    rows = sum(row.num_lanes * (_CPU if row.label == "CPU" else _LANE) + _GAP for row in picture.rows)
    return rows + _RANK_GAP * (len({row.rank for row in picture.rows}) - 1)


def _legend() -> list[Any]:
    return [
        _patch((0, 0), 1, 1, facecolor=_MICRO_BATCHES[0], label="micro-batch 0"),
        _patch((0, 0), 1, 1, facecolor=_MICRO_BATCHES[1], label="micro-batch 1"),
        _patch((0, 0), 1, 1, facecolor="white", edgecolor=_MUTED, hatch="/////", label="CPU waits for communication"),
        _patch((0, 0), 1, 1, facecolor=_ALARM, label="communication that nothing hides"),
    ]


def _patch(corner: tuple[float, float], width: float, height: float, **style: Any) -> Any:
    return importlib.import_module("matplotlib.patches").Rectangle(corner, width, height, **style)
