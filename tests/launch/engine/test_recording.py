"""The recorder's modes through the engine: what a dump holds for requests that ran."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_jobs import EngineSettings, greedy_request, make_engine, run_waves
from tiny_models import TinyModel

from moesaic.eplb.load_record import load
from moesaic.eplb.token_recorder import load_tokens
from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.messages import Control
from moesaic.launch.engine.recording import FOLDER_VARIABLE, RecordingSettings

PROMPT = [7, 3, 250, 8, 9, 30]
NUM_TOKENS = 5
NUM_RUN = len(PROMPT) + NUM_TOKENS - 1  # the last new token is never run


def _command(engine: RankEngine, number: int, command: str) -> str:
    engine.control(Control(control_id=number, command=command))  # type: ignore[arg-type]
    replies = engine.step().replies
    assert [reply.ok for reply in replies] == [True]
    return replies[0].message


def _recorded(model: TinyModel, settings: RecordingSettings) -> str:
    """The path of a dump of one request."""
    engine = make_engine(EngineSettings(model_path=str(model.folder), recording=settings, prefix_cache=False))
    _command(engine, 1, "start_record")
    run_waves(engine, [[greedy_request(0, PROMPT, NUM_TOKENS)]])
    _command(engine, 2, "stop_record")
    return _command(engine, 3, "dump_record")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))


def test_per_pass_has_a_window_for_every_forward_and_says_which_it_was(tiny: Callable[..., TinyModel]) -> None:
    record = load(_recorded(tiny("plain"), RecordingSettings(mode="per_pass", model_name="tiny")))
    assert record.forward_modes == ("prefill", *["decode"] * (NUM_TOKENS - 1))
    assert record.num_tokens is not None
    assert record.num_tokens.tolist() == [len(PROMPT), *[1] * (NUM_TOKENS - 1)]
    assert (record.logical_count.sum(axis=2) == 4 * record.num_tokens[:, None]).all()  # top-4
    assert record.model == "tiny"


def test_a_full_buffer_keeps_the_newest_windows_and_tells_how_many_went(tiny: Callable[..., TinyModel]) -> None:
    record = load(_recorded(tiny("plain"), RecordingSettings(mode="per_pass", buffer_size=2)))
    assert (record.forward_modes, record.num_dropped) == (("decode", "decode"), NUM_TOKENS - 2)


def test_per_token_has_the_choices_of_every_token_at_its_position(tiny: Callable[..., TinyModel]) -> None:
    model = tiny("plain")
    tokens = load_tokens(_recorded(model, RecordingSettings(mode="per_token")))
    assert tokens.positions.tolist() == list(range(NUM_RUN))
    assert tokens.topk_ids.shape == (2, NUM_RUN, 4)
    counts = load(_recorded(model, RecordingSettings(mode="stat"))).logical_count.sum(axis=0)
    for layer, ids in enumerate(tokens.topk_ids):
        assert np.array_equal(np.bincount(ids.ravel(), minlength=16), counts[layer])
