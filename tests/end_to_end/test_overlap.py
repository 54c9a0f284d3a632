"""Overlap as its users see it: sizes measured at start and kept in a file, split steps, a recorded timeline, refusals."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from http_server import wait_for
from live_server import LiveServer
from tiny_models import TinyModel

from moesaic.launch.cli import main
from moesaic.overlap.trace import BadTrace, merge
from moesaic.overlap.trace_file import load_trace

FLAGS = (
    *("--tp", "2", "--dp", "2", "--enable-dp-attention", "--moe-a2a-backend", "torch", "--max-total-tokens", "2048"),
    *("--max-running-requests", "16", "--chunked-prefill-size", "64"),
    *("--enable-two-batch-overlap", "--enable-single-batch-overlap"),
)
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def profile(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured by a server that found no such file; then changed to say that splitting is faster from two tokens on."""
    folder = tmp_path_factory.mktemp("measured")
    path = folder / "tbo.json"
    with LiveServer(model.folder, folder / "log", *FLAGS, "--tbo-profile", str(path)) as server, server.client() as client:
        assert re.search(r"calibrate overlap +\d+\.\d s", server.output)
        assert "two-batch overlap: prefill " in server.output
        shown = _calibration(client)
    kept = json.loads(path.read_text())
    assert {mode: [point["num_tokens"] for point in points] for mode, points in kept["modes"].items()} == {
        "prefill": [2, 4, 8, 16, 32],
        "decode": [2, 4, 8],
    }
    assert (shown["modes"], shown["hardware"]) == (kept["modes"], kept["hardware"])
    for points in kept["modes"].values():
        for point in points:
            point["split_s"] = point["straight_s"] / 2
    path.write_text(json.dumps(kept))
    return path


@pytest.fixture(scope="module")
def splitting(model: TinyModel, profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that splits every step it can."""
    with LiveServer(model.folder, tmp_path_factory.mktemp("splitting") / "log", *FLAGS, "--tbo-profile", str(profile)) as running:
        yield running


def _calibration(client: httpx.Client) -> dict[str, object]:
    rows = client.get("/server_info").json()["resolution"]
    found: dict[str, object] = next(row for row in rows if row["capability"] == "two-batch overlap")["calibration"]
    return found


def _is_whole(file: str) -> bool:
    try:
        return bool(load_trace(file).steps)
    except BadTrace:
        return False


def _generate_many(client: httpx.Client) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, answers), several on each rank at once."""
    rng = random.Random(8)
    prompts = [[rng.randrange(4, 500) for _ in range(rng.randrange(2, 60))] for _ in range(12)]
    sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}

    def ask(prompt: list[int]) -> list[int]:
        answer = client.post("/generate", json={"input_ids": prompt, "sampling_params": sampling})
        assert answer.status_code == 200, answer.text
        tokens: list[int] = answer.json()["output_ids"]
        return tokens

    with ThreadPoolExecutor(12) as threads:
        return prompts, list(threads.map(ask, prompts))


def test_a_recorded_server_splits_its_steps_and_gives_the_oracles_tokens(
    splitting: LiveServer, model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with splitting.client() as client:
        assert _calibration(client)["split_from_tokens_per_dp_rank"] == {"prefill": 2, "decode": 2}
        started = client.post("/start_profile", json={"output_dir": str(tmp_path), "profile_id": "run", "num_steps": 10})
        prompts, answers = _generate_many(client)
    assert answers == [model.greedy(prompt, NUM_TOKENS) for prompt in prompts]
    assert started.status_code == 200, started.text
    files = started.json()["files"]
    assert files == [str(tmp_path / f"run-rank{rank}.trace.json") for rank in (0, 1)]
    wait_for(lambda: all(map(_is_whole, files)), 10)

    trace = merge(load_trace(file) for file in files)
    assert (trace.ranks, len(trace.steps)) == ((0, 1), 10)
    assert {span.micro_batch for span in trace.row("cpu")} >= {0, 1}
    assert {span.name for span in trace.row("communication")}
    assert main(["timeline", *files]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"hidden communication: \d+\.\d%", shown)
    assert "dispatch_a" in shown


def test_a_recording_ends_when_it_is_told_to(splitting: LiveServer, tmp_path: Path) -> None:
    with splitting.client() as client:
        assert client.post("/stop_profile").status_code == 400
        assert client.post("/start_profile", json={"output_dir": str(tmp_path)}).status_code == 200
        again = client.post("/start_profile", json={"output_dir": str(tmp_path)})
        assert again.status_code == 400
        assert "is running" in again.json()["error"]["message"]
        _generate_many(client)
        stopped = client.post("/stop_profile").json()
        assert stopped["success"] is True
        assert [Path(file).parent for file in stopped["files"]] == [tmp_path] * 2
        assert all(load_trace(file).steps for file in stopped["files"])
        assert client.get("/health").status_code == 200


def test_a_folder_that_can_not_be_written_is_refused_and_the_server_goes_on(
    splitting: LiveServer, model: TinyModel, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with splitting.client() as client:
        refused = client.post("/start_profile", json={"output_dir": str(tmp_path / "file")})
        assert refused.status_code == 400
        assert str(tmp_path / "file") in refused.json()["error"]["message"]
        prompts, answers = _generate_many(client)
    assert answers == [model.greedy(prompt, NUM_TOKENS) for prompt in prompts]


def test_a_profile_of_another_layout_is_refused_at_start(model: TinyModel, profile: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--deepep-mode", "normal", "--tbo-profile", str(profile))
    server = LiveServer(model.folder, tmp_path / "log", *flags)
    assert server.process.wait(60) == 2
    assert f"moesaic serve: --tbo-profile {profile}: measured with deepep_mode auto, this server has normal" in server.output
