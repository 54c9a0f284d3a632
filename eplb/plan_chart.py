"""Balancedness against number of GPUs: the lines of the plan's chart, whoever draws it."""

from __future__ import annotations

from moesaic.eplb.planner import Plan
from moesaic.eplb.replay import PlanPoint
from moesaic.eplb.svg_chart import Series

_TICKS = (1, 2, 4, 8, 16, 32, 72, 144, 320, 512, 1000)


def best_by_size(plan: Plan) -> list[PlanPoint]:
    """The best number of slots of every EP size."""
    return [max(_at(plan, point.ep_size), key=lambda each: each.figure) for point in plan.without]


def chart_lines(plan: Plan) -> list[Series]:
    """Without EPLB; with it at the best number of slots of every EP size, next-window and in-sample; and the bound."""
    best = best_by_size(plan)
    sizes = [point.ep_size for point in best]
    without = Series(name="without EPLB", x=sizes, y=[point.figure for point in plan.without], colour=0)
    in_sample = Series(name="EPLB, in-sample", x=sizes, y=[point.in_sample for point in best], colour=1, dashed=True)
    bound = Series(name="bound for these slots", x=sizes, y=[point.bound for point in best], colour=None, dashed=True)
    if best[0].next_window is None:
        return [without, in_sample, bound]
    return [without, Series(name="EPLB, next window", x=sizes, y=[point.figure for point in best], colour=1), in_sample, bound]


def chart_ticks(plan: Plan) -> list[float]:
    """Labels of the x axis, which is logarithmic: the sizes themselves when few, else round ones among them."""
    sizes = [point.ep_size for point in plan.without]
    if len(sizes) <= 6:
        return [float(size) for size in sizes]
    return [float(tick) for tick in _TICKS if sizes[0] <= tick <= sizes[-1]]


def _at(plan: Plan, ep_size: int) -> list[PlanPoint]:
    return [point for point in plan.by_gpus if point.ep_size == ep_size]
