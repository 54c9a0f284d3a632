"""Balancedness reports and plans as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moesaic.eplb.bounds import gap
from moesaic.eplb.plan_chart import best_by_size
from moesaic.eplb.plan_text import COLUMNS, NOTES, cells, describe, in_order, merge_note
from moesaic.eplb.planner import Plan
from moesaic.eplb.report import BalanceReport, shown_split
from moesaic.eplb.words import counted


def show_report(console: Console, report: BalanceReport, files: Sequence[Path | None]) -> None:
    """Every placement with its bounds, in the other projects' definitions too, and the hot experts. files: what was written."""
    tokens = "" if report.num_tokens is None else f", {report.num_tokens:,} tokens"
    layers, windows = counted(len(report.layer_ids), "sparse layer"), counted(report.num_windows, "window")
    facts = f"{report.source}: {layers} of {report.num_experts} experts, {windows}{tokens}"
    console.print(f"[bold]expert balance[/bold]  {facts}", highlight=False)
    summary = _table(
        "placement", "GPUs", "slots", "whole record", "bound", "gap", "per window", "bound", "gap", "best split", "worst layer"
    )
    peers = _table("placement", "ours", "SGLang", "vLLM", "TensorRT-LLM imbalance")
    for each in report.placements:
        worst = f"{report.layer_ids[each.worst_layer]}: {each.by_layer[each.worst_layer]:.3f}"
        whole = (f"{each.balancedness:.3f}", f"{each.bound:.3f}", f"{gap(each.balancedness, each.bound):.1%}")
        window = (f"{each.per_window:.3f}", f"{each.per_window_bound:.3f}", f"{gap(each.per_window, each.per_window_bound):.1%}")
        summary.add_row(each.name, f"{each.ep_size}", f"{each.num_slots}", *whole, *window, shown_split(each), worst)
        figures = (each.balancedness, each.peers.sglang, each.peers.vllm, each.peers.tensorrt_llm_imbalance)
        peers.add_row(each.name, *(f"{figure:.3f}" for figure in figures))
    console.print(summary)
    console.print(
        "balancedness: mean / max of GPU load, sparse layers only; bound: the most any placement with these slots can have"
    )
    console.print(peers)
    hot = _table("hot expert", "share of layer", "x mean", *(f"replicas: {each.name}" for each in report.placements))
    for expert in report.hot_experts:
        name = f"layer {expert.layer_id}, expert {expert.expert}"
        hot.add_row(name, f"{expert.share:.1%}", f"{expert.times_mean:.1f}", *map(str, expert.replicas))
    console.print(hot)
    _show_files(console, files)


def show_plan(console: Console, plan: Plan, files: Sequence[Path | None]) -> None:
    """The slices of the sweep, and the recommendation last. files: what was written."""
    facts = f"{counted(plan.num_layers, 'sparse layer')} of {plan.num_experts} experts, {counted(plan.num_windows, 'window')}"
    console.print(f"[bold]expert balance plan[/bold]  {plan.source}: {facts}", highlight=False)
    slices = {
        "EP size, without EPLB and at the best number of slots (--json and --html have all)": [*plan.without, *best_by_size(plan)],
        "policies, at the recommended size": plan.by_policy,
        "intervals (in windows), over the whole record": plan.by_interval,
    }
    for title, points in slices.items():
        console.print(f"\n{title}")
        table = _table(*COLUMNS)
        for point in in_order(points):
            table.add_row(*cells(point))
        console.print(table)
    console.print(f"{NOTES} {merge_note(plan)}", highlight=False)
    console.print(f"\n[bold]recommended: {describe(plan.recommendation.point)}[/bold]", highlight=False)
    for reason in plan.recommendation.reasons:
        console.print(f"  - {reason}", highlight=False)
    _show_files(console, files)


def _table(first: str, *numeric: str) -> Table:
    table = Table()
    table.add_column(first)
    for name in numeric:
        table.add_column(name, justify="right")
    return table


def _show_files(console: Console, files: Sequence[Path | None]) -> None:
    for path in files:
        if path is not None:
            console.print(f"written: {path}", highlight=False)
