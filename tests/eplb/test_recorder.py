"""The load recorders count every choice once, keep the last windows (or tokens) only, and their files come back the same."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.eplb.load_counter import LoadCounter
from moesaic.eplb.load_record import BadLoadRecord, LoadRecord, load
from moesaic.eplb.recorder import ExpertLoadRecorder
from moesaic.eplb.token_recorder import ExpertTokenRecorder, load_tokens

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


def test_choices_of_many_shapes_are_all_counted_and_few_tensors_are_kept_for_it() -> None:
    counter = LoadCounter(num_layers=2, num_experts=NUM_EXPERTS)
    rng = np.random.default_rng(0)
    expected = np.zeros((2, NUM_EXPERTS), dtype=np.int64)
    tensors: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    for num_tokens in [*rng.integers(0, 50, 900), 9000, *[0] * 3000, 1, *rng.integers(0, 5000, 9)]:
        for layer in (1, 0):
            topk_ids = rng.integers(-1, NUM_EXPERTS, size=(num_tokens, 2))
            expected[layer] += np.bincount(topk_ids.ravel() + 1, minlength=NUM_EXPERTS + 1)[1:]
            held = torch.from_numpy(topk_ids)
            counter.record(layer, held)
            tensors.add(held)
            del held
            assert len(tensors) < 1024
            assert sum(tensor.numel() for tensor in tensors) < 1 << 14
    assert np.array_equal(counter.take(), expected)
    assert not counter.take().any()
    assert not tensors


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
    assert record.num_dropped == 12


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
        ("forward_modes", np.array(["decode"]), "'forward_modes' must be 2 strings"),
        ("forward_modes", np.array([1, 2]), "'forward_modes' must be 2 strings"),
        ("num_dropped", np.array(-1), "'num_dropped' must be a number of windows, got -1"),
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


def test_per_pass_keeps_what_each_step_was(tmp_path: Path) -> None:
    recorder = make(mode="per_pass", max_windows=3)
    recorder.start()
    for num_tokens, mode in ((5, "prefill"), (2, "decode"), (0, "idle"), (3, "decode")):
        recorder.record(0, torch.full((num_tokens, 2), 1))
        recorder.end_step(num_tokens, mode)
    for suffix in (".npz", ".pt"):
        recorder.dump(tmp_path / f"load{suffix}", num_hidden_layers=8)
        record = load(tmp_path / f"load{suffix}")
        assert record.forward_modes == ("decode", "idle", "decode")
        assert record.num_tokens is not None
        assert record.num_tokens.tolist() == [2, 0, 3]
        assert record.logical_count[:, record.layer_ids.tolist().index(1), 1].tolist() == [4, 0, 6]
        assert record.num_dropped == 1


def test_an_open_window_pushes_the_oldest_out_of_the_snapshot_only() -> None:
    recorder = make(steps_per_window=2, max_windows=2)
    recorder.start()
    counts, _ = run(recorder, 5)
    record = recorder.snapshot()
    assert np.array_equal(record.logical_count, np.stack([counts[2:4].sum(0), counts[4]]))
    assert record.num_dropped == 1
    recorder.stop()
    assert recorder.snapshot().num_dropped == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "per_pass", "steps_per_window": 4}, "steps_per_window must be 1, got 4"),
        ({"mode": "per_token"}, "no mode 'per_token'; choose one of stat, per_pass"),
    ],
)
def test_a_mode_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**wrong)


def make_token_recorder(max_tokens: int = 1000) -> ExpertTokenRecorder:
    token_bytes = len(LAYER_IDS) * 2 * 2 + 16
    return ExpertTokenRecorder(
        layer_ids=LAYER_IDS, num_experts=NUM_EXPERTS, top_k=2, max_bytes=max_tokens * token_bytes + token_bytes - 1
    )


def run_tokens(recorder: ExpertTokenRecorder, sizes: list[int], seed: int = 0) -> torch.Tensor:
    """Steps of these many tokens, positions 10, 11, ... in each; returns all their ids [layers, tokens, 2]."""
    rng = torch.Generator().manual_seed(seed)
    steps = [torch.randint(0, NUM_EXPERTS, (len(LAYER_IDS), size, 2), generator=rng) for size in sizes]
    for ids in steps:
        for layer_index, layer_ids in enumerate(ids):
            recorder.record(layer_index, layer_ids)
        recorder.end_step(torch.arange(ids.shape[1]) + 10)
    return torch.cat(steps, dim=1)


def test_per_token_keeps_every_choice_with_its_step_and_position(tmp_path: Path) -> None:
    recorder = make_token_recorder()
    run_tokens(recorder, [3])
    recorder.start()
    ids = run_tokens(recorder, [3, 0, 2], seed=1)
    recorder.stop()
    run_tokens(recorder, [4])
    recorder.dump(tmp_path / "tokens.npz", model="demo", domain="prose")
    record = load_tokens(tmp_path / "tokens.npz")
    assert np.array_equal(record.topk_ids, ids.numpy())
    assert record.step_ids.tolist() == [0, 0, 0, 2, 2]
    assert record.positions.tolist() == [10, 11, 12, 10, 11]
    assert (record.layer_ids.tolist(), record.num_experts, record.num_dropped) == (LAYER_IDS, NUM_EXPERTS, 0)
    assert (record.model, record.domain) == ("demo", "prose")


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [12], [1, 11], [4, 8], [7, 2, 3]])
def test_per_token_keeps_the_last_tokens_and_tells_how_many_it_dropped(sizes: list[int]) -> None:
    recorder = make_token_recorder(max_tokens=7)
    recorder.start()
    ids = run_tokens(recorder, sizes)
    record = recorder.snapshot()
    assert np.array_equal(record.topk_ids, ids[:, -7:].numpy())
    assert record.num_dropped == 5
    assert record.step_ids.tolist() == np.repeat(np.arange(len(sizes)), sizes)[-7:].tolist()


def test_per_token_puts_micro_batches_after_each_other_and_leaves_padding_out() -> None:
    recorder = make_token_recorder()
    recorder.start()
    first, second = torch.tensor([[0, 1], [-1, -1]]), torch.tensor([[2, -1]])
    for layer_index in range(len(LAYER_IDS)):
        recorder.record(layer_index, first)
        recorder.record(layer_index, second)
    recorder.end_step()
    first.zero_()
    record = recorder.snapshot()
    assert record.topk_ids.tolist() == [[[0, 1], [2, -1]]] * len(LAYER_IDS)
    assert record.positions.tolist() == [-1, -1]


GOOD_TOKENS: dict[str, Any] = {
    "topk_ids": np.zeros((3, 5, 2), dtype=np.int16),
    "step_ids": np.zeros(5, dtype=np.int64),
    "positions": np.zeros(5, dtype=np.int64),
    "layer_ids": np.array([1, 2, 5], dtype=np.int32),
    "num_experts": np.array(4),
    "num_dropped": np.array(0),
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("topk_ids", None, "'topk_ids' is missing"),
        ("topk_ids", np.zeros((3, 5, 2)), "'topk_ids' must hold integers, got float64"),
        ("topk_ids", np.zeros((2, 5, 2), dtype=int), r"'topk_ids' must have shape \[3 layers.*\], got \[2, 5, 2\]"),
        ("topk_ids", np.full((3, 5, 2), 4), "'topk_ids' holds expert 4 for token 0 of layer 1, but there are 4"),
        ("step_ids", np.zeros(4, dtype=int), "'step_ids' must be 5 numbers"),
    ],
)
def test_a_bad_file_of_tokens_is_refused_by_field(field: str, value: Any, message: str, tmp_path: Path) -> None:
    fields = {name: content for name, content in {**GOOD_TOKENS, field: value}.items() if content is not None}
    np.savez(tmp_path / "bad.npz", **fields)
    with pytest.raises(BadLoadRecord, match=f"bad.npz: field {message}"):
        load_tokens(tmp_path / "bad.npz")


def test_what_is_no_file_of_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(BadLoadRecord, match=r"text.npz: not a readable \.npz"):
        load_tokens(tmp_path / "text.npz")
    with pytest.raises(BadLoadRecord, match="no such file"):
        load_tokens(tmp_path / "absent.npz")
    with pytest.raises(BadLoadRecord, match=r"expected a \.npz file"):
        load_tokens(tmp_path / "absent.pt")
    with pytest.raises(BadLoadRecord, match=r"must end in \.npz"):
        make_token_recorder().dump(tmp_path / "tokens.pt")
    with pytest.raises(ValueError, match="one token takes 28 bytes"):
        ExpertTokenRecorder(layer_ids=LAYER_IDS, num_experts=NUM_EXPERTS, top_k=2, max_bytes=27)


def test_counts_over_int32_survive(tmp_path: Path) -> None:
    counts = np.full((1, 1, 2), 2**40, dtype=np.int64)
    LoadRecord(logical_count=counts, layer_ids=np.array([0], dtype=np.int32), num_tokens=None).save(tmp_path / "a.npz")
    assert load(tmp_path / "a.npz").logical_count.tolist() == counts.tolist()


@pytest.mark.parametrize("wrong", [{"max_windows": 0}, {"max_bytes": 10}, {"steps_per_window": 0}])
def test_a_recorder_that_could_hold_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="one window takes 48 bytes"):
        make(**wrong)
