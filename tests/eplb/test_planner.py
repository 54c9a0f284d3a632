"""The plan replays a load honestly: next-window figures never saw their windows, moves are counted, and its advice follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesaic.eplb.load_record import LoadRecord
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.plan_chart import best_by_size, chart_lines, chart_ticks
from moesaic.eplb.plan_html import render_plan_html
from moesaic.eplb.planner import Plan, PlanOptions, make_plan
from moesaic.eplb.replay import Cluster, Replay, experts_received
from moesaic.eplb.report import BadReport
from moesaic.eplb.report_json import plan_json
from moesaic.eplb.report_png import save_chart_png
from moesaic.eplb.words import size

EXPERT_BYTES = 1000


def record(counts: np.ndarray[Any, Any]) -> LoadRecord:
    layer_ids = np.arange(counts.shape[1], dtype=np.int32)
    return LoadRecord(logical_count=counts.astype(np.int64), layer_ids=layer_ids, num_tokens=None)


def drifting(
    num_windows: int = 24, num_layers: int = 3, num_experts: int = 32, drift: float = 0.0, spread: float = 1.0
) -> LoadRecord:
    rng = np.random.default_rng(1)
    start = rng.normal(0, spread, (num_layers, num_experts))
    walk = np.cumsum(rng.normal(0, drift, (num_windows, num_layers, num_experts)), axis=0)
    return record(np.rint(np.exp(start + walk) * 1000))


def plan(loads: LoadRecord | None = None, **options: Any) -> Plan:
    wanted: dict[str, Any] = {"expert_bytes": EXPERT_BYTES, "ep_sizes": (4, 8), "gpus_per_node": 4} | options
    return make_plan(loads or drifting(drift=0.1), PlanOptions(**wanted), source="load.npz")


def swapping() -> Replay:
    """The hot expert of every window is cold in the next one: what was learnt is always wrong."""
    even, odd = [[90, 10, 10, 10]], [[10, 10, 10, 90]]
    return Replay(counts=np.array([even, odd] * 4), warm_up=1, run=1, expert_bytes=EXPERT_BYTES)


def test_the_next_window_is_never_learnt_from() -> None:
    point = swapping().rebalanced(Cluster(ep_size=2, num_slots=6), "auto", 1)
    assert point.in_sample == pytest.approx(1.0)
    # Three slots a GPU: the expert that was hot has replicas on both, the one that is hot now lies on one of them.
    assert point.next_window is not None
    assert point.next_window <= 60 / 100
    assert point.bound == 1.0
    assert point.num_rebalances == 7


def test_a_load_that_stays_needs_one_move_and_is_known_in_advance() -> None:
    loads = drifting(drift=0.0)
    [point] = plan(loads, ep_sizes=(4,), redundant=(8,)).by_gpus
    assert point.next_window == pytest.approx(point.in_sample)
    assert point.first_bytes > 0
    assert point.bytes_per_rebalance == 0


def test_experts_received_are_those_a_gpu_did_not_hold() -> None:
    before = ExpertLocation(physical_to_logical=np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), num_experts=4, ep_size=2)
    swapped_inside = before.with_layer(0, np.array([1, 0, 3, 2]))
    assert experts_received(before, swapped_inside).tolist() == [0, 0]
    across = swapped_inside.with_layer(1, np.array([0, 2, 1, 3]))
    assert experts_received(before, across).tolist() == [1, 1]


def test_all_intervals_carry_the_same_windows() -> None:
    counts = drifting(num_windows=12, drift=0.2).logical_count
    replay = Replay(counts=counts, warm_up=4, run=2, expert_bytes=EXPERT_BYTES)
    points = {each: replay.rebalanced(Cluster(ep_size=4, num_slots=32), "auto", each) for each in (1, 2, 4)}
    assert [points[each].num_rebalances for each in (1, 2, 4)] == [8, 4, 2]
    assert [points[each].interval for each in (1, 2, 4)] == [2, 4, 8]
    assert len({point.bound for point in points.values()}) == 1


@pytest.mark.parametrize("ep_size", [1, 3, 7, 40, 333])
def test_slots_are_rounded_up_to_whole_gpus(ep_size: int) -> None:
    swept = plan(drifting(num_windows=4), ep_sizes=(ep_size,), algorithms=("deepseek",), redundant=(0, 1, 2))
    assert swept.without[0].num_slots == -(-32 // ep_size) * ep_size
    for point in swept.by_gpus:
        assert point.num_slots % ep_size == 0
        assert point.num_slots - ep_size < 32 + 2
        assert point.num_redundant_experts == point.num_slots - 32
    assert len({point.num_slots for point in swept.by_gpus}) == len(swept.by_gpus)


def test_one_window_has_no_next_and_the_reasons_say_so() -> None:
    swept = plan(drifting(num_windows=1))
    assert all(point.next_window is None for point in (*swept.without, *swept.by_gpus))
    assert "in-sample (the record has no next window, so this is optimistic)" in swept.recommendation.reasons[-1]
    assert "next window" not in {line.name for line in chart_lines(swept)}


def test_the_largest_size_above_the_target_is_recommended() -> None:
    swept = plan(ep_sizes=(2, 4, 8, 16))
    best = {point.ep_size: point.figure for point in best_by_size(swept)}
    target = best[8] - 0.001
    chosen = plan(ep_sizes=(2, 4, 8, 16), target=target).recommendation.point.ep_size
    assert chosen == max(ep_size for ep_size, figure in best.items() if figure >= target) == 8
    unreachable = plan(ep_sizes=(4, 8), target=1.0).recommendation
    assert unreachable.reasons[0].startswith("No EP size keeps a balancedness of 1.00")
    assert plan(ep_size=16, target=1.0).recommendation.point.ep_size == 16


def test_the_fewest_slots_that_are_as_good_are_recommended() -> None:
    # Nearly even loads: redundant experts can't help.
    flat = plan(drifting(spread=0.3), ep_sizes=(4,), redundant=(0, 8, 16))
    chosen = flat.recommendation.point
    assert chosen.num_slots == 32
    assert chosen.figure >= 0.99 * max(point.figure for point in flat.by_gpus)


def test_eplb_is_not_recommended_where_it_does_not_pay() -> None:
    swept = plan(record(np.full((12, 2, 32), 100)))
    assert swept.recommendation.point.policy == "none"
    assert "EPLB doesn't pay here" in swept.recommendation.reasons[-1]


def test_among_near_equals_the_policy_and_interval_that_move_less_are_recommended() -> None:
    swept = plan(drifting(drift=0.01), ep_sizes=(8,), algorithms=("deepseek", "auto"))
    assert [point.policy for point in swept.by_policy] == ["deepseek", "auto"]
    deepseek, auto = (point.bytes_per_rebalance for point in swept.by_policy)
    assert deepseek is not None
    assert auto is not None
    assert auto < 0.5 * deepseek
    assert swept.recommendation.point.policy == "auto"
    longest = max(point.interval or 0 for point in swept.by_interval)
    assert swept.recommendation.point.interval == longest


def test_long_records_are_merged_and_intervals_are_in_their_windows() -> None:
    swept = plan(drifting(num_windows=100, drift=0.02), ep_sizes=(4,), intervals=(1, 10, 20))
    assert swept.run == 4
    assert [point.interval for point in swept.by_interval] == [4, 12, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ep_sizes": (0,)}, "ep_size must be from 1 to 1000, got 0"),
        ({"ep_size": 1001}, "ep_size must be from 1 to 1000, got 1001"),
        ({"redundant": (-1,)}, r"redundant must be numbers from 0 on, got \[-1\]"),
        ({"intervals": ()}, r"intervals must be numbers from 1 on, got \[\]"),
        ({"intervals": (25,)}, "an interval of 25 windows is longer than the record: 24"),
        ({"expert_bytes": 0}, "expert_bytes must be 1 or more"),
        ({"target": 1.5}, "target must be above 0 and at most 1"),
        (
            {"algorithms": ("deepseek_hierarchical",), "num_groups": 4, "ep_sizes": (4, 24)},
            "algorithm deepseek_hierarchical on 24 GPUs: num_groups 4 can't be split evenly over num_nodes 6",
        ),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadReport, match=message):
        plan(**options)


def test_a_record_without_load_is_refused_by_field() -> None:
    with pytest.raises(BadReport, match=r"load.npz: field 'logical_count' is all zero"):
        plan(record(np.zeros((2, 2, 4))))


def test_the_chart_has_a_point_for_every_size_and_the_page_every_setting() -> None:
    swept = plan(ep_sizes=(1, 2, 4, 6, 8, 12, 16))
    for line in chart_lines(swept):
        assert list(line.x) == [1, 2, 4, 6, 8, 12, 16]
        assert all(0 < y <= 1 for y in line.y)
    assert chart_ticks(swept) == [1, 2, 4, 8, 16]
    page = render_plan_html(swept)
    num_points = len(swept.without) + len(swept.by_gpus) + len(swept.by_policy) + len(swept.by_interval)
    assert page.count("<tr>") == num_points + 3
    assert "http" not in page
    value = plan_json(swept)
    assert len(value["by_gpus"]) == len(swept.by_gpus)
    assert value["recommendation"]["reasons"]


def test_the_chart_is_drawn_as_png(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    swept = plan()
    ticks = chart_ticks(swept)
    save_chart_png(chart_lines(swept), tmp_path / "a.png", title="t", x_label="GPUs", y_label="b", x_ticks=ticks, log_x=True)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (44_050_944, "44.1 MB"), (1.2345e12, "1.23 TB"), (4e15, "4,000 TB")]
)
def test_sizes_have_three_digits(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_figures_of_a_sweep_are_over_the_same_windows_at_the_recommended_interval() -> None:
    swept = plan(drifting(num_windows=24, drift=0.3), ep_sizes=(2, 4, 8))
    interval = swept.recommendation.point.interval
    assert interval is not None
    # So strong a drift asks for a short interval, and a size must not be judged at a longer one.
    assert interval < max(point.interval or 0 for point in swept.by_interval)
    assert {point.interval for point in (*swept.by_gpus, *swept.by_policy)} == {interval}
    assert {point.num_rebalances for point in (*swept.by_gpus, *swept.by_policy)} == {3}
    assert swept.recommendation.point in swept.by_policy
