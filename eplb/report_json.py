"""Reports and plans as JSON-able values. Keys are stable: scripts read them. Balancednesses are rounded to six digits."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moesaic.eplb.bounds import gap
from moesaic.eplb.planner import Plan
from moesaic.eplb.replay import PlanPoint
from moesaic.eplb.report import BalanceReport, FloatArray, PlacementReport


def report_json(report: BalanceReport) -> dict[str, Any]:
    """The whole report but the heat map's tooltips: everything the page shows."""
    return {
        "source": report.source,
        "model": report.model,
        "domain": report.domain,
        "layer_ids": list(report.layer_ids),
        "num_experts": report.num_experts,
        "num_windows": report.num_windows,
        "num_tokens": report.num_tokens,
        "point_starts": report.point_starts.tolist(),
        "placements": [_placement(each, report) for each in report.placements],
        "hot_experts": [
            asdict(hot) | {"share": round(hot.share, 6), "times_mean": round(hot.times_mean, 6), "replicas": list(hot.replicas)}
            for hot in report.hot_experts
        ],
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    """The sweep with its recommendation."""
    chosen = plan.recommendation
    return {
        "source": plan.source,
        "num_layers": plan.num_layers,
        "num_experts": plan.num_experts,
        "num_windows": plan.num_windows,
        "windows_per_point": plan.run,
        "expert_bytes": plan.expert_bytes,
        "without_eplb": [_point(each) for each in plan.without],
        "by_gpus": [_point(each) for each in plan.by_gpus],
        "by_policy": [_point(each) for each in plan.by_policy],
        "by_interval": [_point(each) for each in plan.by_interval],
        "recommendation": _point(chosen.point) | {"reasons": list(chosen.reasons)},
    }


def _placement(placement: PlacementReport, report: BalanceReport) -> dict[str, Any]:
    return {
        "name": placement.name,
        "ep_size": placement.ep_size,
        "num_slots": placement.num_slots,
        "whole_record": _figure(placement.balancedness, placement.bound),
        "per_window": _figure(placement.per_window, placement.per_window_bound),
        "best_split": None if placement.split_optimum is None else round(placement.split_optimum, 6),
        "worst_layer": report.layer_ids[placement.worst_layer],
        "sglang_balancedness": round(placement.peers.sglang, 6),
        "vllm_balancedness": round(placement.peers.vllm, 6),
        "tensorrt_llm_imbalance": round(placement.peers.tensorrt_llm_imbalance, 6),
        "by_layer": _rounded(placement.by_layer),
        "bound_by_layer": _rounded(placement.bound_by_layer),
        "best_split_by_layer": None if placement.split_by_layer is None else _rounded(placement.split_by_layer),
        "by_point": _rounded(placement.by_point),
        "bound_by_point": _rounded(placement.bound_by_point),
        "relative_load": _rounded(placement.relative_load),
    }


def _point(point: PlanPoint) -> dict[str, Any]:
    rounded = {"in_sample": round(point.in_sample, 6), "bound": round(point.bound, 6)}
    next_window = None if point.next_window is None else round(point.next_window, 6)
    return asdict(point) | rounded | {"next_window": next_window, "gap": round(gap(point.figure, point.bound), 6)}


def _figure(value: float, bound: float) -> dict[str, float]:
    return {"balancedness": round(value, 6), "bound": round(bound, 6), "gap": round(gap(value, bound), 6)}


def _rounded(values: FloatArray) -> list[Any]:
    rounded: list[Any] = values.round(6).tolist()
    return rounded
