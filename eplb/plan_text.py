"""The words of a plan: settings in a line, points as rows of text, and what the columns mean. For pages and terminals alike."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.eplb.bounds import gap
from moesaic.eplb.planner import Plan
from moesaic.eplb.replay import PlanPoint
from moesaic.eplb.words import size

COLUMNS = (
    *("policy", "GPUs", "slots", "redundant", "interval", "in-sample", "next window", "bound", "gap"),
    *("moves", "first move", "later moves", "busiest GPU"),
)
NOTES = (
    "Balancedness is mean / max of GPU load: mean over sparse layers, then over windows weighted by tokens. In-sample: of the "
    "windows a placement was solved from. Next window: of those after it, which is what a server gets. Bound: the most that any "
    "placement with as many slots could have, made for each window by itself; gap: how far next window is below it. Moves: expert "
    "weights received from other GPUs, all GPUs together (first: coming from the trivial placement; later: mean of the others), "
    "and the most by one GPU."
)


def merge_note(plan: Plan) -> str:
    """What was merged and rounded, in a sentence or two."""
    merged = f"Windows are replayed in runs of {plan.run}. " if plan.run > 1 else ""
    swept = plan.by_gpus[0]
    merged += f"EP sizes and policies: an interval of {swept.interval}, the last {swept.num_rebalances} placements of the record. "
    return merged + "Slots are rounded up so that they divide among the GPUs, without EPLB too."


def describe(point: PlanPoint) -> str:
    """A setting in one line."""
    if point.interval is None:
        return f"{point.ep_size} GPUs, {point.num_slots} slots, without EPLB"
    every = "every window" if point.interval == 1 else f"every {point.interval} windows"
    return (
        f"{point.ep_size} GPUs, {point.num_redundant_experts} redundant experts ({point.num_slots} slots), policy {point.policy}, "
        f"a rebalance {every}"
    )


def in_order(points: Sequence[PlanPoint]) -> list[PlanPoint]:
    """By GPUs, without EPLB first, then by slots."""
    return sorted(points, key=lambda point: (point.ep_size, point.interval is not None, point.num_slots))


def cells(point: PlanPoint) -> list[str]:
    """A point as text, one per column."""
    moved = (point.first_bytes, point.bytes_per_rebalance, point.busiest_gpu_bytes) if point.num_rebalances else (None,) * 3
    return [
        point.policy,
        f"{point.ep_size}",
        f"{point.num_slots}",
        f"{point.num_redundant_experts}",
        "-" if point.interval is None else f"{point.interval}",
        f"{point.in_sample:.3f}",
        "-" if point.next_window is None else f"{point.next_window:.3f}",
        f"{point.bound:.3f}",
        f"{gap(point.figure, point.bound):.1%}",
        f"{point.num_rebalances}",
        *("-" if each is None else size(each) for each in moved),
    ]
