"""The plan as one HTML page: the recommendation, the chart over GPUs, and every slice of the sweep as a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from moesaic.eplb.html_page import page, table
from moesaic.eplb.plan_chart import chart_lines, chart_ticks
from moesaic.eplb.plan_text import COLUMNS, NOTES, cells, describe, in_order, merge_note
from moesaic.eplb.planner import Plan
from moesaic.eplb.replay import PlanPoint
from moesaic.eplb.svg_chart import line_chart
from moesaic.eplb.words import counted


def render_plan_html(plan: Plan) -> str:
    """The whole document: nothing is fetched from anywhere."""
    chart = line_chart(chart_lines(plan), x_label="GPUs", y_label="balancedness", x_ticks=chart_ticks(plan), log_x=True)
    policies_at, intervals_at = (
        f"{each.ep_size} GPUs, {each.num_slots} slots" for each in (plan.by_policy[0], plan.by_interval[0])
    )
    sections = [
        _header(plan),
        _recommendation(plan),
        f"<h2>Balancedness against number of GPUs</h2>{chart}",
        f'<p class="soft">{escape(NOTES)}</p>',
        f"<h2>Policies <span class='soft'>({policies_at})</span></h2>{_table(plan.by_policy)}",
        f"<h2>Intervals <span class='soft'>({intervals_at})</span></h2>{_table(plan.by_interval)}",
        f"<h2>EP sizes and redundant experts</h2>{_table([*plan.without, *plan.by_gpus])}",
    ]
    return page(f"Expert balance plan: {plan.source}", sections)


def _header(plan: Plan) -> str:
    facts = (
        f"{counted(plan.num_layers, 'sparse layer')} of {plan.num_experts} experts, {counted(plan.num_windows, 'window')}, "
        f"{plan.expert_bytes:,} bytes per expert. {merge_note(plan)}"
    )
    return f'<h1>Expert balance plan</h1><p class="soft">{escape(plan.source)}: {facts}</p>'


def _recommendation(plan: Plan) -> str:
    point = plan.recommendation.point
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in plan.recommendation.reasons)
    return f'<div class="lead"><b>{escape(describe(point))}</b><ul>{reasons}</ul></div>'


def _table(points: Sequence[PlanPoint]) -> str:
    rows = [[escape(cell) for cell in cells(point)] for point in in_order(points)]
    return table(COLUMNS, rows)
