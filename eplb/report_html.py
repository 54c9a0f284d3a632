"""The balancedness report as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from moesaic.eplb.bounds import gap
from moesaic.eplb.heat_map import colour_limit
from moesaic.eplb.html_page import page, table
from moesaic.eplb.report import BalanceReport, PlacementReport, distinct_bounds, shown_split
from moesaic.eplb.svg_chart import Series, line_chart
from moesaic.eplb.svg_heat_map import TOOLTIP_SCRIPT, heat_map, label_places, ramp
from moesaic.eplb.words import counted


def render_html(report: BalanceReport) -> str:
    """The whole document: no script, style, font or picture is fetched from anywhere."""
    sections = [
        _header(report),
        _summary(report),
        _heat_maps(report),
        _over_time(report),
        _over_layers(report),
        _hot_experts(report),
        _peers(report),
        _layer_table(report),
    ]
    return page(f"Expert balance: {report.source}", sections, script=TOOLTIP_SCRIPT)


def _header(report: BalanceReport) -> str:
    tokens = "" if report.num_tokens is None else f"{report.num_tokens:,} tokens"
    facts = [
        f"{counted(len(report.layer_ids), 'sparse layer')} of {report.num_experts} experts",
        counted(report.num_windows, "window"),
        *(escape(fact) for fact in (tokens, report.model, report.domain) if fact),
    ]
    return f'<h1>Expert balance</h1><p class="soft">{escape(report.source)}: {", ".join(facts)}</p>'


def _summary(report: BalanceReport) -> str:
    head = ["placement", "GPUs", "slots", "whole record", "bound", "gap", "per window", "bound", "gap", "best split", "worst layer"]
    rows = [
        [
            escape(each.name),
            f"{each.ep_size}",
            f"{each.num_slots}",
            f"<b>{each.balancedness:.3f}</b>",
            f"{each.bound:.3f}",
            f"{gap(each.balancedness, each.bound):.1%}",
            f"<b>{each.per_window:.3f}</b>",
            f"{each.per_window_bound:.3f}",
            f"{gap(each.per_window, each.per_window_bound):.1%}",
            shown_split(each),
            f"{report.layer_ids[each.worst_layer]}: {each.by_layer[each.worst_layer]:.3f}",
        ]
        for each in report.placements
    ]
    note = (
        "Balancedness is mean / max of GPU load, sparse layers only, with each expert's load split evenly over its replicas: the "
        "share of expert time in which the average GPU works while the slowest finishes. <i>Whole record</i>: counts of all "
        "windows summed, mean over layers. <i>Per window</i>: mean over layers, then over windows weighted by tokens. "
        "<i>Bound</i>: the most that any placement with as many slots can have; <i>gap</i>: how far below it. <i>Best split</i>: "
        "the same placement, whole record, if every expert's load were split in the best proportion over its replicas."
    )
    return table(head, rows) + f'<p class="soft">{note}</p>'


def _heat_maps(report: BalanceReport) -> str:
    limit = max(colour_limit(each.relative_load) for each in report.placements)
    maps = "".join(
        f"<div><h3>{escape(each.name)}</h3>{heat_map(each.relative_load, report.layer_ids, limit)}</div>"
        for each in report.placements
    )
    grid = "display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:8px 32px"
    return (
        "<h2>Load of every GPU in every sparse layer</h2>"
        f'<p class="soft">Whole record; 1.0 is the mean of the layer.</p>{ramp(limit)}<div style="{grid}">{maps}</div>'
    )


def _with_bounds(report: BalanceReport, x: Sequence[float], values: str, bounds: str) -> list[Series]:
    """A line per placement, and a dashed one per different bound."""
    lines = [
        Series(name=each.name, x=x, y=getattr(each, values).tolist(), colour=index) for index, each in enumerate(report.placements)
    ]
    return lines + [
        Series(name=f"bound, {each.num_slots} slots", x=x, y=getattr(each, bounds).tolist(), colour=index, dashed=True)
        for index, each in distinct_bounds(report)
    ]


def _over_time(report: BalanceReport) -> str:
    """Nothing for one window: the summary has said it."""
    if len(report.point_starts) == 1:
        return ""
    lines = _with_bounds(report, report.point_starts.tolist(), "by_point", "bound_by_point")
    run = -(-report.num_windows // len(report.point_starts))
    each = "window" if run == 1 else f"run of {run} windows, their mean weighted by tokens"
    chart = line_chart(lines, x_label="window", y_label="balancedness")
    return f'<h2>Balancedness over time</h2><p class="soft">Mean over layers; a point per {each}.</p>{chart}'


def _over_layers(report: BalanceReport) -> str:
    """Nothing for one layer: the summary has said it."""
    if len(report.layer_ids) == 1:
        return ""
    lines = _with_bounds(report, report.layer_ids, "by_layer", "bound_by_layer")
    ticks = [report.layer_ids[row] for row in label_places(len(report.layer_ids), 16)]
    chart = line_chart(lines, x_label="layer", y_label="balancedness", x_ticks=ticks)
    return f'<h2>Balancedness of every layer</h2><p class="soft">Whole record.</p>{chart}'


def _hot_experts(report: BalanceReport) -> str:
    most = max(hot.times_mean for hot in report.hot_experts)
    rows = [
        [
            f"{hot.layer_id}",
            f"{hot.expert}",
            f"{hot.share:.1%}",
            f"{hot.times_mean:.1f}",
            *(f"{replicas}" for replicas in hot.replicas),
            f'<span class="bar" style="width:{160 * hot.times_mean / most:.0f}px"></span>',
        ]
        for hot in report.hot_experts
    ]
    head = ["layer", "expert", "share of layer", "x mean", *(f"replicas:<br>{escape(each.name)}" for each in report.placements), ""]
    # The bars begin at the left: an odd column out, so it gets a cell that fills from there.
    return "<h2>Hot experts</h2>" + table(head, rows, numeric_from=0).replace('<td class="n"><span', "<td><span")


def _peers(report: BalanceReport) -> str:
    head = ["placement", "ours", "SGLang", "vLLM", "TensorRT-LLM imbalance"]
    rows = [
        [
            escape(each.name),
            f"{each.balancedness:.3f}",
            f"{each.peers.sglang:.3f}",
            f"{each.peers.vllm:.3f}",
            f"{each.peers.tensorrt_llm_imbalance:.3f}",
        ]
        for each in report.placements
    ]
    note = (
        f"The same loads in other projects' definitions, to compare with figures they print. SGLang: mean over all "
        f"{report.num_hidden_layers} layers of the model, a dense one counted as 1.0. vLLM: sum over layers of the means / sum "
        "over layers of the maxes. TensorRT-LLM: (max - mean) / mean, mean over layers, where 0 is perfect."
    )
    return f'<h2>In other definitions</h2>{table(head, rows)}<p class="soft">{note}</p>'


def _layer_table(report: BalanceReport) -> str:
    head = ["layer", *(f"{escape(each.name)}<br>{part}" for each in report.placements for part in ("balancedness", "bound", "gap"))]
    rows = [
        [f"{layer_id}", *(cell for each in report.placements for cell in _layer_cells(each, row))]
        for row, layer_id in enumerate(report.layer_ids)
    ]
    return f"<details><summary>All layers as a table</summary>{table(head, rows, numeric_from=0)}</details>"


def _layer_cells(placement: PlacementReport, row: int) -> list[str]:
    value, bound = float(placement.by_layer[row]), float(placement.bound_by_layer[row])
    return [f"{value:.3f}", f"{bound:.3f}", f"{gap(value, bound):.1%}"]
