"""The report's figures are the plainest ones and stand beside their bounds; its pages hold all they show and fetch nothing."""

from __future__ import annotations

import base64
import json
import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.eplb.algorithm import place_experts
from moesaic.eplb.bounds import gap
from moesaic.eplb.heat_map import RAMP, colour_limit, png_data_uri
from moesaic.eplb.load_record import LoadRecord
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.report import BadReport, BalanceReport, balance_report, merge_windows
from moesaic.eplb.report_html import render_html
from moesaic.eplb.report_json import report_json
from moesaic.eplb.report_png import save_report_png
from moesaic.eplb.svg_chart import nice_ticks

# Two windows of one layer of four experts, then a second layer in perfect balance.
COUNTS = np.array([[[6, 2, 1, 1], [5, 5, 5, 5]], [[10, 0, 10, 0], [5, 5, 5, 5]]], dtype=np.int64)


def record(counts: np.ndarray[Any, Any] = COUNTS, **kwargs: Any) -> LoadRecord:
    layer_ids = np.arange(1, 1 + counts.shape[1], dtype=np.int32)
    return LoadRecord(logical_count=counts, layer_ids=layer_ids, num_tokens=None, **kwargs)


def trivial(num_layers: int = 2, num_experts: int = 4, num_slots: int = 4, ep_size: int = 2) -> ExpertLocation:
    return ExpertLocation.trivial(num_layers=num_layers, num_experts=num_experts, num_slots=num_slots, ep_size=ep_size)


def random_report(num_windows: int, num_layers: int, num_experts: int = 16, ep_size: int = 4) -> BalanceReport:
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 1, (num_layers, num_experts)) * 100
    loads = record(rng.poisson(load, (num_windows, num_layers, num_experts)).astype(np.int64))
    solved = place_experts(loads.logical_count.sum(axis=0), num_slots=num_experts + ep_size, ep_size=ep_size)
    placements = {"without EPLB": trivial(num_layers, num_experts, num_experts, ep_size), "EPLB <auto>": solved}
    return balance_report(loads, placements, source="<b>load</b>.npz")


def test_figures_are_those_done_by_hand() -> None:
    report = balance_report(record(), {"trivial": trivial()}, num_hidden_layers=4)
    [placement] = report.placements
    # Layer 1, whole record: experts 16, 2, 11, 1, so GPUs 18 and 12, of which the mean is 15.
    assert placement.relative_load.tolist() == [[1.2, 0.8], [1.0, 1.0]]
    assert placement.by_layer == pytest.approx([15 / 18, 1.0])
    assert placement.balancedness == pytest.approx((15 / 18 + 1) / 2)
    # One expert holds 16 of 30: with 4 slots a GPU has at least 16, where the mean is 15.
    assert placement.bound_by_layer == pytest.approx([15 / 16, 1.0])
    # Windows: GPUs 8 and 2, then 10 and 10; the second window has 40 of all 70 choices.
    assert placement.by_point == pytest.approx([(5 / 8 + 1) / 2, 1.0])
    assert placement.per_window == pytest.approx(((5 / 8 + 1) / 2 * 30 + 40) / 70)
    assert placement.peers.sglang == pytest.approx((15 / 18 + 1 + 2) / 4, abs=1e-5)
    assert placement.peers.vllm == pytest.approx((15 + 20) / (18 + 20))
    assert placement.peers.tensorrt_llm_imbalance == pytest.approx((3 / 15 + 0) / 2)
    assert placement.worst_layer == 0


def test_hot_experts_are_those_with_the_largest_share_of_their_layer() -> None:
    replicated = ExpertLocation(physical_to_logical=np.array([[0, 1, 2, 3, 0, 2]] * 2), num_experts=4, ep_size=2)
    report = balance_report(record(), {"trivial": trivial(), "replicated": replicated})
    first, second = report.hot_experts[:2]
    assert (first.layer_id, first.expert, first.replicas) == (1, 0, (1, 2))
    assert first.share == pytest.approx(16 / 30)
    assert first.times_mean == pytest.approx(4 * 16 / 30)
    assert (second.layer_id, second.expert, second.replicas) == (1, 2, (1, 2))


def test_no_figure_is_above_its_bound_and_the_best_split_is_between() -> None:
    pytest.importorskip("scipy")
    for placement in random_report(20, 5).placements:
        assert placement.split_by_layer is not None
        assert (placement.by_layer <= placement.split_by_layer + 1e-9).all()
        assert (placement.split_by_layer <= placement.bound_by_layer + 1e-9).all()
        assert (placement.by_point <= placement.bound_by_point + 1e-9).all()
        assert 0 <= gap(placement.per_window, placement.per_window_bound) < 1


def test_many_windows_become_few_points_that_keep_the_mean() -> None:
    report = random_report(1000, 2)
    for placement in report.placements:
        assert len(report.point_starts) == len(placement.by_point) <= 96
        # Even runs of nearly equal windows: the plain mean over points is the mean over windows, but for noise in tokens.
        assert placement.by_point.mean() == pytest.approx(placement.per_window, rel=0.01)


def test_merged_windows_keep_every_choice() -> None:
    counts = np.arange(7 * 2 * 3).reshape(7, 2, 3)
    merged, starts = merge_windows(counts, 3)
    assert starts.tolist() == [0, 3, 6]
    assert np.array_equal(merged, np.stack([counts[:3].sum(0), counts[3:6].sum(0), counts[6]]))


def test_a_layer_or_window_without_tokens_is_in_balance() -> None:
    counts = COUNTS.copy()
    counts[:, 1] = 0
    counts[1] = 0
    [placement] = balance_report(record(counts), {"trivial": trivial()}).placements
    assert placement.by_layer[1] == 1.0
    assert placement.relative_load[1].tolist() == [1.0, 1.0]
    assert placement.by_point[1] == 1.0
    assert placement.per_window == placement.by_point[0]


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(BadReport, match="placement 'mine' has 3 sparse layers of 4 experts, but the load has 2 of 4"):
        balance_report(record(), {"mine": trivial(num_layers=3)})
    with pytest.raises(BadReport, match=r"a\.npz: field 'logical_count' is all zero"):
        balance_report(record(np.zeros_like(COUNTS)), {"trivial": trivial()}, source="a.npz")
    with pytest.raises(BadReport, match="num_hidden_layers is 2, but the load has a layer 2"):
        balance_report(record(), {"trivial": trivial()}, num_hidden_layers=2)


def test_json_has_every_figure_beside_its_gap() -> None:
    value = json.loads(json.dumps(report_json(random_report(5, 3))))
    for placement in value["placements"]:
        for figure in (placement["whole_record"], placement["per_window"]):
            assert figure["gap"] == pytest.approx(1 - figure["balancedness"] / figure["bound"], abs=1e-5)
    assert np.shape(value["placements"][0]["relative_load"]) == (3, 4)


class PageReader(HTMLParser):
    """Every tag and attribute of a page, and whether tags are closed in order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize(("num_windows", "num_layers"), [(1, 1), (30, 1), (1, 58), (30, 58)])
def test_the_page_fetches_nothing_and_is_well_formed(num_windows: int, num_layers: int) -> None:
    report = random_report(num_windows, num_layers)
    text = render_html(report)
    reader = PageReader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    links = [value for _, name, value in reader.attributes if name in ("src", "href", "xlink:href", "action")]
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert len(links) == len(report.placements)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    # Names from outside are shown, not run.
    assert "<b>load</b>.npz" in "".join(reader.texts)
    assert "EPLB <auto>" in reader.texts
    charts = (num_windows > 1) + (num_layers > 1)
    assert text.count("<polyline") == charts * 4


def test_the_embedded_picture_has_the_colours_of_its_values() -> None:

    png = base64.b64decode(png_data_uri(np.array([[0.0, 2.0, 9.0], [1.0, 1.0, 1.0]]), 2.0).split(",")[1])
    assert struct.unpack(">II", png[16:24]) == (3, 2)
    length = struct.unpack(">I", png[33:37])[0]
    lines = zlib.decompress(png[41 : 41 + length])
    first = bytes.fromhex(RAMP[0][1:]) + bytes.fromhex(RAMP[-1][1:]) * 2
    assert lines[:10] == b"\0" + first
    assert lines[11:14] == lines[14:17] == lines[17:20]


@pytest.mark.parametrize(("largest", "limit"), [(1.0, 2.0), (2.2, 2.5), (3.9, 4.0), (40.0, 4.0)])
def test_the_ramp_ends_where_the_even_load_is_still_seen(largest: float, limit: float) -> None:
    assert colour_limit(np.array([0.1, largest])) == limit


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.9, 1.0), (0.0, 479.0), (3.0, 3.0), (1.0, 1000.0)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


@pytest.mark.parametrize(("num_windows", "num_layers"), [(1, 1), (5, 3)])
def test_a_png_is_drawn_for_one_layer_as_for_many(num_windows: int, num_layers: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_report_png(random_report(num_windows, num_layers), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_and_scipy_the_report_says_what_is_missing() -> None:
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["scipy"] = sys.modules["scipy.optimize"] = None
sys.path.insert(0, sys.argv[1])
from test_report import random_report
from moesaic.eplb.report import shown_split
from moesaic.eplb.report_png import MissingReportExtra, save_report_png
report = random_report(2, 2)
assert [shown_split(each) for each in report.placements] == ["needs scipy"] * 2
try:
    save_report_png(report, "never.png")
except MissingReportExtra as error:
    print(error)
"""
    here = str(Path(__file__).parent)
    result = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True, check=True)
    assert result.stdout == "a PNG needs matplotlib: pip install 'moesaic[report]'\n"
