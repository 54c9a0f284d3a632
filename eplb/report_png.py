"""The balancedness report and the plan's chart as PNG pictures, by matplotlib: the optional extra `report`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.eplb.bounds import gap
from moesaic.eplb.heat_map import RAMP, colour_limit
from moesaic.eplb.html_page import LIGHT_PALETTE
from moesaic.eplb.report import BalanceReport, PlacementReport, distinct_bounds
from moesaic.eplb.svg_chart import Series, balancedness_floor
from moesaic.eplb.words import counted

_DPI = 150
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a93a3",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#e2e6ec",
    "lines.linewidth": 1.3,
    "legend.frameon": False,
}
_MUTED = "#6b7280"
_CHART_HEIGHT = 2.7


@dataclass(frozen=True, kw_only=True)
class _Lines:
    """A chart of the report by the names of its fields: x of the report, values and bounds of every placement."""

    title: str
    x_label: str
    x: str
    values: str
    bounds: str


_LINES = (
    _Lines(
        title="Balancedness over time (mean over layers)",
        x_label="window",
        x="point_starts",
        values="by_point",
        bounds="bound_by_point",
    ),
    _Lines(
        title="Balancedness of every layer (whole record)",
        x_label="layer",
        x="layer_ids",
        values="by_layer",
        bounds="bound_by_layer",
    ),
)


class MissingReportExtra(ValueError):  # noqa: N818 - reads as what is wrong
    """PNG was asked for where matplotlib isn't installed."""


def save_report_png(report: BalanceReport, path: str | Path) -> None:
    """Heat maps above, balancedness over time and over layers below, where there are several of them.

    Raises MissingReportExtra without matplotlib.
    """
    matplotlib = _matplotlib()
    map_height = 1.6 + min(3.6, 0.28 * len(report.layer_ids))
    with matplotlib.rc_context(_STYLE):
        charts = [lines for lines in _LINES if len(getattr(report, lines.x)) > 1]
        heights = [map_height, *[_CHART_HEIGHT] * len(charts)]
        figure = _figure(width=max(9.0, 4.4 * len(report.placements)), height=sum(heights) + 0.3)
        panels = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        tokens = "" if report.num_tokens is None else f", {report.num_tokens:,} tokens"
        windows = counted(report.num_windows, "window")
        figure.suptitle(f"Expert balance: {Path(report.source).name}, {windows}{tokens}", x=0.01, ha="left")
        _draw_heat_maps(panels[0], report)
        for panel, each in zip(panels[1:], charts, strict=True):
            axes = panel.subplots()
            _draw_lines(axes, report, each)
            if each is charts[-1]:
                panel.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=4)
        figure.savefig(path, dpi=_DPI)


def _draw_lines(axes: Any, report: BalanceReport, lines: _Lines) -> None:
    x = getattr(report, lines.x)
    for index, each in enumerate(report.placements):
        axes.plot(x, getattr(each, lines.values), color=LIGHT_PALETTE[index], marker="o", markersize=2, label=each.name)
    for index, each in distinct_bounds(report):
        style = {"color": LIGHT_PALETTE[index], "linestyle": (0, (4, 3)), "linewidth": 1, "label": f"bound, {each.num_slots} slots"}
        axes.plot(x, getattr(each, lines.bounds), **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish_axes(axes, title=lines.title, x_label=lines.x_label)


def save_chart_png(
    series: list[Series], path: str | Path, *, title: str, x_label: str, y_label: str, x_ticks: list[float], log_x: bool
) -> None:
    """One line chart of balancednesses, as svg_chart.py draws it. Raises MissingReportExtra without matplotlib."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_STYLE):
        figure = _figure(width=10.0, height=4.6)
        axes = figure.subplots()
        for line in series:
            axes.plot(
                line.x,
                line.y,
                color=_MUTED if line.colour is None else LIGHT_PALETTE[line.colour],
                linestyle=(0, (4, 3)) if line.dashed else "-",
                marker="o",
                markersize=2.5,
                label=line.name,
            )
        if log_x:
            axes.set_xscale("log")
        axes.set_xticks(x_ticks, [f"{tick:g}" for tick in x_ticks])
        axes.set_xticks([], minor=True)
        axes.set_ylim(balancedness_floor(series), 1.005)
        _finish_axes(axes, title=title, x_label=x_label, y_label=y_label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(path, dpi=_DPI)


def _draw_heat_maps(panel: Any, report: BalanceReport) -> None:
    colours = importlib.import_module("matplotlib.colors").LinearSegmentedColormap.from_list("load", RAMP)
    limit = max(colour_limit(each.relative_load) for each in report.placements)
    every_axes = panel.subplots(1, len(report.placements), squeeze=False)[0]
    image = None
    for axes, each in zip(every_axes, report.placements, strict=True):
        image = axes.imshow(each.relative_load, cmap=colours, vmin=0, vmax=limit, aspect="auto", interpolation="nearest")
        axes.set_title(_map_title(each))
        axes.set_xlabel("GPU")
        rows = range(0, len(report.layer_ids), -(-len(report.layer_ids) // 10))
        axes.set_yticks(list(rows), [str(report.layer_ids[row]) for row in rows])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[:].set_visible(False)
    every_axes[0].set_ylabel("layer")
    bar = panel.colorbar(image, ax=list(every_axes), fraction=0.03, pad=0.01, extend="max")
    bar.set_label("GPU load / mean of its layer")
    bar.outline.set_visible(False)


def _map_title(placement: PlacementReport) -> str:
    value, bound = placement.balancedness, placement.bound
    return f"{placement.name}\n{value:.3f}, bound {bound:.3f}, gap {gap(value, bound):.1%}"


def _finish_axes(axes: Any, *, title: str, x_label: str, y_label: str = "balancedness") -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, axis="y")
    axes.margins(x=0.01)


def _figure(*, width: float, height: float) -> Any:
    return importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _matplotlib() -> Any:
    # By name, so that neither importing this file nor checking its types needs the package.
    try:
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise MissingReportExtra("a PNG needs matplotlib: pip install 'moesaic[report]'") from error
