"""`moesaic eplb report` and `plan` on real recordings: tables, JSON and pages; and what can't be done is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesaic.eplb.load_record import LoadRecord, load
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.location_file import save_location
from moesaic.launch.eplb_cli import run_eplb
from moesaic.launch.errors import ConfigError

TRACES = Path(__file__).parents[2] / "benchmarks" / "traces"


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first windows of a real recording: 4 sparse layers (1..4) of 32 experts."""
    record = load(TRACES / "code.npz")
    path = tmp_path_factory.mktemp("dump") / "code.npz"
    counts, tokens = record.logical_count[:12], record.num_tokens
    assert tokens is not None
    LoadRecord(logical_count=counts, layer_ids=record.layer_ids, num_tokens=tokens[:12], model="demo").save(path)
    return str(path)


def test_the_report_shows_every_placement_with_its_bound(dump: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    placement = ExpertLocation.trivial(num_layers=4, num_experts=32, num_slots=36, ep_size=4)
    save_location(placement, tmp_path / "placement.json", layer_ids=[1, 2, 3, 4])
    page = tmp_path / "report.html"
    assert run_eplb(["report", dump, "--placement", str(tmp_path / "placement.json"), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "without EPLB",
        "given placement",
        "EPLB auto",
        "SGLang",
        "vLLM",
        "TensorRT-LLM",
        "bound",
        "gap",
        f"written: {page}",
    ):
        assert words in shown
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_report_as_json(dump: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_eplb(["report", dump, "--json", "--ep-size", "4", "--num-redundant-experts", "8"]) == 0
    report = json.loads(capsys.readouterr().out)
    without, solved = report["placements"]
    assert (without["num_slots"], solved["num_slots"]) == (32, 40)
    assert solved["whole_record"]["balancedness"] > without["whole_record"]["balancedness"]
    assert report["num_tokens"] == 12 * 1024


def test_the_plan_ends_in_a_recommendation(dump: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    assert run_eplb(["plan", dump, "--ep-sizes", "4,8", "--eplb-algorithm", "auto", "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "recommended: " in shown
    assert "rounded up so that they divide" in " ".join(shown.split())
    assert "Balancedness against number of GPUs" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "expert_bytes"),
    [
        ([], 3 * 7168 * 2048 + 4 * 3 * 56 * 16),
        (["--hidden-size", "256", "--moe-intermediate-size", "100", "--expert-dtype", "bf16"], 2 * 3 * 256 * 100),
        (["--expert-bytes", "12"], 12),
    ],
)
def test_the_plan_as_json_counts_bytes_of_experts(
    dump: str, flags: list[str], expert_bytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_eplb(["plan", dump, "--json", "--ep-sizes", "4", "--eplb-algorithm", "deepseek", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["expert_bytes"] == expert_bytes
    assert all(point["first_bytes"] % expert_bytes == 0 for point in plan["by_gpus"])
    assert [point["ep_size"] for point in plan["without_eplb"]] == [4]


def test_both_commands_draw_pngs(dump: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_eplb(["report", dump, "--json", "--png", str(tmp_path / "report.png")])
    run_eplb(["plan", dump, "--json", "--ep-sizes", "4,8", "--png", str(tmp_path / "plan.png")])
    for name in ("report.png", "plan.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("report absent.npz", "absent.npz: no such file"),
        ("report DUMP --ep-size 0", "--ep-size: expected a number from 1 to 1000, got '0'"),
        ("report DUMP --ep-size 7 --num-redundant-experts 4", "36 slots can't be dealt evenly to --ep-size 7 GPUs; use 3 or 10"),
        ("report DUMP --num-expert-groups 5", "--num-expert-groups 5 doesn't divide the 32 experts of"),
        ("report DUMP --num-hidden-layers 3", "num_hidden_layers is 3, but the load has a layer 4"),
        ("report DUMP --placement absent.json", "absent.json: no such file"),
        ("report DUMP --placement OTHER", "field 'layer_ids' names layers 3..4 (2), but the model's sparse layers are 1..4 (4)"),
        ("report DUMP --placement FITS --ep-size 5", "36 slots can't be dealt evenly to 5 GPUs"),
        ("report DUMP --html /nowhere/report.html", "/nowhere/report.html"),
        ("report DUMP --eplb-algorithm best", "invalid choice: 'best'"),
        ("plan DUMP --ep-sizes 8,", "expected a number from 1 to 1000, got ''"),
        ("plan DUMP --eplb-algorithm auto,best", "expected some of auto, deepseek, deepseek_hierarchical, got 'best'"),
        ("plan DUMP --interval 13", "an interval of 13 windows is longer than the record: 12"),
        ("plan DUMP --target 2", "--target: expected a fraction above 0 and at most 1, got '2'"),
        ("plan ZERO", "field 'logical_count' must have shape [num_windows, num_layers, num_experts], none of them 0"),
        ("plan IDLE", "field 'logical_count' is all zero"),
        ("plan", "the following arguments are required: DUMP"),
        ("paln DUMP", "paln"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(arguments: str, message: str, dump: str, tmp_path: Path) -> None:
    other = ExpertLocation.trivial(num_layers=2, num_experts=32, num_slots=36, ep_size=4)
    save_location(other, tmp_path / "other.json", layer_ids=[3, 4])
    fits = ExpertLocation.trivial(num_layers=4, num_experts=32, num_slots=36, ep_size=4)
    save_location(fits, tmp_path / "fits.npz", layer_ids=[1, 2, 3, 4])
    for name, shape in (("zero", (0, 1, 4)), ("idle", (2, 1, 4))):
        np.savez(tmp_path / f"{name}.npz", logical_count=np.zeros(shape, dtype=np.int32), layer_ids=np.array([1]))
    files = {"DUMP": dump} | {
        name.split(".")[0].upper(): str(tmp_path / name) for name in ("other.json", "fits.npz", "zero.npz", "idle.npz")
    }
    with pytest.raises(ConfigError) as caught:
        run_eplb([files.get(word, word) for word in arguments.split()])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
