"""The load recorder counts every choice once, keeps the last windows only, and its files come back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.eplb.load_record import BadLoadRecord, LoadRecord, load
from moesaic.eplb.recorder import ExpertLoadRecorder

LAYER_IDS, NUM_EXPERTS = [1, 2, 5], 4


def make(**kwargs: Any) -> ExpertLoadRecorder:
    return ExpertLoadRecorder(layer_ids=LAYER_IDS, num_experts=NUM_EXPERTS, **kwargs)


def run(recorder: ExpertLoadRecorder, num_steps: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Random steps; returns the counts of each by the plainest means, [num_steps, layers, experts], and the tokens."""
    rng = np.random.default_rng(seed)
    counts, num_tokens = np.zeros((num_steps, len(LAYER_IDS), NUM_EXPERTS), dtype=np.int64), []
    for step in range(num_steps):
        num_tokens.append(int(rng.integers(0, 6)))
        for layer in range(len(LAYER_IDS)):
            topk_ids = rng.integers(-1, NUM_EXPERTS, size=(num_tokens[-1], 2))
            for expert in topk_ids.flatten():
                if expert >= 0:
                    counts[step, layer, expert] += 1
            recorder.record(layer, torch.from_numpy(topk_ids))
        recorder.end_step(num_tokens[-1])
    return counts, num_tokens


def test_every_choice_is_counted_once_and_padding_never() -> None:
    recorder = make(steps_per_window=2)
    recorder.start()
    counts, num_tokens = run(recorder, 6)
    record = recorder.snapshot()
    assert np.array_equal(record.logical_count, counts.reshape(3, 2, 3, 4).sum(axis=1))
    assert record.num_tokens is not None
    assert record.num_tokens.tolist() == np.reshape(num_tokens, (3, 2)).sum(axis=1).tolist()


def test_an_open_window_is_part_of_the_snapshot_and_goes_on() -> None:
    recorder = make(steps_per_window=4)
    recorder.start()
    counts, _ = run(recorder, 6)
    assert np.array_equal(recorder.snapshot().logical_count, np.stack([counts[:4].sum(0), counts[4:].sum(0)]))
    more, _ = run(recorder, 2, seed=1)
    assert np.array_equal(recorder.snapshot().logical_count[1], counts[4:].sum(0) + more.sum(0))


@pytest.mark.parametrize("bound", [{"max_windows": 5}, {"max_bytes": 5 * 3 * 4 * 4}])
def test_only_the_last_windows_are_kept(bound: dict[str, int]) -> None:
    recorder = make(**bound)
    recorder.start()
    counts, num_tokens = run(recorder, 17)
    record = recorder.snapshot()
    assert np.array_equal(record.logical_count, counts[-5:])
    assert record.num_tokens is not None
    assert record.num_tokens.tolist() == num_tokens[-5:]


def test_nothing_is_counted_when_stopped_and_a_start_begins_anew() -> None:
    recorder = make(steps_per_window=3)
    run(recorder, 2)
    assert recorder.snapshot().logical_count.shape == (0, 3, 4)
    recorder.start()
    first, _ = run(recorder, 2)
    recorder.stop()
    run(recorder, 2, seed=1)
    assert np.array_equal(recorder.snapshot().logical_count[0], first.sum(axis=0))
    recorder.start()
    second, _ = run(recorder, 1, seed=2)
    assert np.array_equal(recorder.snapshot().logical_count, second)


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_a_dump_loads_as_it_was(suffix: str, tmp_path: Path) -> None:
    recorder = make(steps_per_window=2)
    recorder.start()
    run(recorder, 7)
    written = recorder.dump(tmp_path / f"load{suffix}", model="demo", domain="prose", num_hidden_layers=8)
    read = load(tmp_path / f"load{suffix}")
    assert np.array_equal(read.logical_count, written.logical_count)
    assert read.layer_ids.tolist() == LAYER_IDS
    assert read.num_tokens is not None
    assert written.num_tokens is not None
    assert read.num_tokens.tolist() == written.num_tokens.tolist()
    assert (read.model, read.domain) == ("demo", "prose")


def test_the_pt_form_is_sglangs_with_a_row_per_model_layer(tmp_path: Path) -> None:
    recorder = make()
    recorder.start()
    counts, _ = run(recorder, 3)
    recorder.dump(tmp_path / "load.pt", num_hidden_layers=8)
    logical_count = torch.load(tmp_path / "load.pt", weights_only=True)["logical_count"]
    assert logical_count.shape == (3, 8, NUM_EXPERTS)
    assert np.array_equal(logical_count[:, LAYER_IDS], counts)
    assert logical_count[:, [0, 3, 4, 6, 7]].sum() == 0


@pytest.mark.parametrize("num_axes", [2, 3])
def test_a_file_from_sglang_itself_is_read(num_axes: int, tmp_path: Path) -> None:
    counts = torch.zeros(6, NUM_EXPERTS, dtype=torch.float32)
    counts[3:] = torch.arange(12).reshape(3, 4)
    torch.save({"rank": 0, "logical_count": counts if num_axes == 2 else counts[None]}, tmp_path / "sglang.pt")
    record = load(tmp_path / "sglang.pt")
    assert record.layer_ids.tolist() == [3, 4, 5]
    assert record.logical_count.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]]
    assert record.num_tokens is None


GOOD: dict[str, Any] = {
    "logical_count": np.ones((2, 3, 4), dtype=np.int32),
    "layer_ids": np.array([1, 2, 5], dtype=np.int32),
    "num_tokens": np.array([2, 2], dtype=np.int32),
}


def test_fields_of_later_versions_do_no_harm(tmp_path: Path) -> None:
    np.savez(tmp_path / "load.npz", **GOOD, window_tokens=np.array(1024))
    assert load(tmp_path / "load.npz").logical_count.shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logical_count", None, "'logical_count' is missing"),
        ("layer_ids", None, "'layer_ids' is missing"),
        ("logical_count", np.ones(4, dtype=np.int32), r"'logical_count' must have shape .* got \[4\]"),
        ("logical_count", np.ones((0, 3, 4), dtype=np.int32), "'logical_count' must have shape"),
        ("logical_count", -GOOD["logical_count"], "'logical_count' holds negative"),
        ("logical_count", GOOD["logical_count"] * 0.5, "'logical_count' holds values that are not whole"),
        ("logical_count", np.full((2, 3, 4), np.nan), "'logical_count' holds values that are not whole"),
        ("logical_count", np.full((2, 3, 4), "x"), "'logical_count' must be an array of integers"),
        ("layer_ids", np.array([1, 2], dtype=np.int32), "'layer_ids' names 2 layers, 'logical_count' has 3"),
        ("layer_ids", np.array([1, 1, 2], dtype=np.int32), "'layer_ids' must be ascending"),
        ("layer_ids", np.array([-1, 1, 2], dtype=np.int32), "'layer_ids' must be ascending"),
        ("num_tokens", np.array([1], dtype=np.int32), "'num_tokens' must be 2 counts"),
    ],
)
def test_a_bad_file_is_refused_by_field(field: str, value: Any, message: str, tmp_path: Path) -> None:
    fields = {name: content for name, content in {**GOOD, field: value}.items() if content is not None}
    np.savez(tmp_path / "bad.npz", **fields)
    with pytest.raises(BadLoadRecord, match=f"bad.npz: field {message}"):
        load(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"logical_count": "x"}, "'logical_count' must be an array of integers, got str"),
        ({"logical_count": torch.zeros(1, 2, 3)}, "all zero"),
        ({"logical_count": torch.ones(1, 2, 3), "layer_ids": torch.tensor([2])}, "'layer_ids' names layer 2"),
        ([1], "it holds a list"),
    ],
)
def test_a_bad_pt_file_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(BadLoadRecord, match=message):
        load(tmp_path / "bad.pt")


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code in a load file was run')",))


def test_files_that_are_no_such_files_are_refused_and_never_run(tmp_path: Path) -> None:
    torch.save({"logical_count": Exploit()}, tmp_path / "evil.pt")
    np.savez(tmp_path / "evil.npz", logical_count=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("evil.pt", "evil.npz", "text.npz", "text.pt", "empty.npz"):
        with pytest.raises(BadLoadRecord, match=f"{name}: not a readable"):
            load(tmp_path / name)
    with pytest.raises(BadLoadRecord, match="no such file"):
        load(tmp_path / "absent.pt")
    with pytest.raises(BadLoadRecord, match=r"expected a \.npz or \.pt"):
        load(tmp_path / "load.csv")


def test_counts_over_int32_survive(tmp_path: Path) -> None:
    counts = np.full((1, 1, 2), 2**40, dtype=np.int64)
    LoadRecord(logical_count=counts, layer_ids=np.array([0], dtype=np.int32), num_tokens=None).save(tmp_path / "a.npz")
    assert load(tmp_path / "a.npz").logical_count.tolist() == counts.tolist()


@pytest.mark.parametrize("wrong", [{"max_windows": 0}, {"max_bytes": 10}, {"steps_per_window": 0}])
def test_a_recorder_that_could_hold_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="one window takes 48 bytes"):
        make(**wrong)
