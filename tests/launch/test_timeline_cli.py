"""`moesaic timeline` on recorded traces: tables, JSON, page and picture; what can't be done is refused in one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from moesaic.launch.cli import main
from moesaic.launch.errors import ConfigError
from moesaic.launch.timeline_cli import run_timeline
from moesaic.overlap.executor import Schedule
from moesaic.overlap.operations import Operation, State, YieldOperation
from moesaic.overlap.stages import Strategy, join_layers
from moesaic.overlap.timeline import Timeline
from moesaic.overlap.trace import Trace
from moesaic.overlap.trace_file import save_trace


def record(rank: int) -> Trace:
    """Three steps of four layers in two micro-batches, with a communication each."""
    timeline = Timeline(rank=rank)

    def dispatch_a(state: State) -> None:
        state.put("handle", timeline.communication("dispatch <&>"))

    def dispatch_b(state: State) -> None:
        with timeline.wait("dispatch <&>"):
            state.take("handle").end()

    layers = {
        index: [Operation("dispatch_a", dispatch_a, index), YieldOperation(), Operation("dispatch_b", dispatch_b, index)]
        for index in range(1, 5)
    }
    stages = join_layers(layers, Strategy(name="test", yields_per_layer=1, delta_stages=0))
    for step in range(3):
        with timeline.step(step):
            Schedule.lockstep(stages, stages, delta_stages=0).run((State(), State()), timeline)
    return timeline.trace()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A trace per rank."""
    folder = tmp_path_factory.mktemp("traces")
    for rank in (0, 1):
        save_trace(record(rank), folder / f"rank{rank}.json")
    return [str(folder / f"rank{rank}.json") for rank in (0, 1)]


def test_the_tables_show_ranks_operations_and_waits(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_timeline(files) == 0
    shown = " ".join(capsys.readouterr().out.split())  # lines break where the path is long
    for words in ("2 ranks, 3 steps", "hidden communication:", "idle computation row:", "dispatch_b", "dispatch <&> of layer"):
        assert words in shown


def test_it_is_a_subcommand_that_refuses_in_one_line(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", *files]) == 0
    assert "hidden communication:" in capsys.readouterr().out
    assert main(["timeline", "absent.json"]) == 2
    assert capsys.readouterr().err == "moesaic timeline: absent.json: no such file\n"
    assert main(["--help"]) == 0
    assert "moesaic timeline TRACE..." in capsys.readouterr().out


def test_the_report_as_json(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run_timeline([*files, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert 0 <= report["hidden_share"] <= 1
    counts = {kind["name"]: kind["count"] for kind in report["kinds"]}
    assert counts == {"dispatch <&>": 48, "dispatch_a": 48, "dispatch_b": 48}
    assert len(report["step_us"]) == 3


def test_one_rank_can_be_chosen(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run_timeline([*files, "--json", "--rank", "1"])
    assert [rank["rank"] for rank in json.loads(capsys.readouterr().out)["ranks"]] == [1]


def test_the_page_fetches_nothing_and_shows_the_chosen_step(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "timeline.html"
    run_timeline([*files, "--html", str(page), "--step", "2"])
    text = page.read_text(encoding="utf-8")
    assert f"written: {page}" in capsys.readouterr().out
    assert text.startswith("<!doctype html>")
    assert "Step 2: " in text
    assert "Layers 2 to 3, close" in text
    assert text.count('<svg class="timeline"') == 2
    assert not re.search(r"<link|@import|src=|href=|url\((?!#)", text)
    assert "dispatch &lt;&amp;&gt; of layer 2, micro-batch 1, rank 0" in text
    assert "dispatch <&>" not in text


def test_the_picture_is_a_png(files: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_timeline([*files, "--json", "--png", str(tmp_path / "timeline.png")])
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_names_the_extra(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"a PNG needs matplotlib: pip install 'moesaic\[report\]'"):
        run_timeline([*files, "--png", "timeline.png"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.json"], "absent.json: no such file"),
        (["TRACE", "--step", "9"], "the trace has no step 9; its steps are 0, 1, 2"),
        (["TRACE", "--rank", "3"], "the trace has no rank 3; its ranks are 0"),
        (["TRACE", "--html", "/nowhere/page.html"], "/nowhere/page.html"),
        ([], "TRACE"),
    ],
)
def test_what_can_not_be_done_is_refused(arguments: list[str], message: str, files: list[str]) -> None:
    with pytest.raises(ConfigError, match=message):
        run_timeline([files[0] if argument == "TRACE" else argument for argument in arguments])
