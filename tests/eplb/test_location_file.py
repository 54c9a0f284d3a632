"""A placement comes back from every file form as it was, and what cannot be served is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.eplb.location import BadLocation, ExpertLocation, Int64Array
from moesaic.eplb.location_file import load_location, save_location

LAYER_IDS, NUM_EXPERTS = [1, 2, 5], 4
SLOTS = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 3], [0, 0, 1, 1, 2, 3]], dtype=np.int64)
MODEL: dict[str, Any] = {"num_layers": 3, "num_experts": 4, "num_slots": 6, "ep_size": 2}


def location() -> ExpertLocation:
    return ExpertLocation(physical_to_logical=SLOTS, num_experts=NUM_EXPERTS, ep_size=2, num_nodes=2)


def hottest_twice(counts: Int64Array) -> Int64Array:
    """A solve for the tests: every expert once, then the hottest two again."""
    hottest = np.argsort(-counts, axis=1, kind="stable")[:, :2]
    return np.hstack([np.tile(np.arange(counts.shape[1]), (len(counts), 1)), hottest])


def test_trivial_is_the_trivial_placement() -> None:
    loaded = load_location("trivial", **MODEL)
    assert loaded.physical_to_logical.tolist() == [[0, 1, 2, 3, 0, 1]] * 3


@pytest.mark.parametrize("suffix", [".npz", ".json", ".pt"])
@pytest.mark.parametrize("given", [MODEL, {"num_layers": 3, "num_experts": 4}])
def test_a_saved_placement_loads_as_it_was(suffix: str, given: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / f"placement{suffix}"
    save_location(location(), path, layer_ids=LAYER_IDS, num_hidden_layers=7)
    for layer_ids in (LAYER_IDS, None):
        loaded = load_location(path, layer_ids=layer_ids, **given)
        assert np.array_equal(loaded.physical_to_logical, SLOTS)
        assert (loaded.num_experts, loaded.ep_size, loaded.num_nodes) == (NUM_EXPERTS, 2, 2)


def test_the_servers_sizes_win_over_the_files(tmp_path: Path) -> None:
    save_location(location(), tmp_path / "a.npz", layer_ids=LAYER_IDS)
    loaded = load_location(tmp_path / "a.npz", num_layers=3, num_experts=4, ep_size=6, num_nodes=3)
    assert (loaded.ep_size, loaded.num_nodes) == (6, 3)


def test_the_pt_form_has_a_row_per_model_layer_with_dense_ones_trivial(tmp_path: Path) -> None:
    save_location(location(), tmp_path / "a.pt", layer_ids=LAYER_IDS, num_hidden_layers=7)
    slots = torch.load(tmp_path / "a.pt", weights_only=True)["physical_to_logical_map"]
    assert slots.shape == (7, 6)
    assert np.array_equal(slots[LAYER_IDS], SLOTS)
    assert slots[[0, 3, 4, 6]].tolist() == [[0, 1, 2, 3, 0, 1]] * 4


@pytest.mark.parametrize("field", ["physical_to_logical", "physical_to_logical_map"])
def test_inline_json_of_the_map_form(field: str) -> None:
    loaded = load_location(json.dumps({field: SLOTS.tolist()}), **MODEL)
    assert np.array_equal(loaded.physical_to_logical, SLOTS)


def test_inline_json_of_the_load_form_is_solved_for() -> None:
    counts = [[5, 1, 9, 1], [1, 2, 3, 4], [0, 0, 0, 0]]
    loaded = load_location(json.dumps({"logical_count": counts}), **MODEL, solve=hottest_twice)
    assert loaded.physical_to_logical[:, 4:].tolist() == [[2, 0], [3, 2], [0, 1]]


def test_sglangs_dump_with_windows_and_dense_rows_is_summed_and_cut(tmp_path: Path) -> None:
    counts = torch.zeros(2, 7, NUM_EXPERTS, dtype=torch.int32)
    counts[0, 1] = torch.tensor([6, 0, 0, 1])
    counts[1, 1] = torch.tensor([0, 5, 4, 4])
    counts[1, 5] = torch.tensor([0, 0, 2, 3])
    torch.save({"rank": 0, "logical_count": counts}, tmp_path / "sglang.pt")
    seen = []

    def solve(load: Int64Array) -> Int64Array:
        seen.append(load.tolist())
        return hottest_twice(load)

    load_location(tmp_path / "sglang.pt", **MODEL, layer_ids=LAYER_IDS, solve=solve)
    # Layer 2 is sparse but saw no tokens: it keeps its row.
    assert seen == [[[6, 5, 4, 5], [0, 0, 0, 0], [0, 0, 2, 3]]]


def without(expert: int, layer: int) -> list[list[int]]:
    rows = SLOTS.tolist()
    rows[layer] = [other if other != expert else (expert + 1) % NUM_EXPERTS for other in rows[layer]]
    return rows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"physical_to_logical": without(2, 1)}, "inline JSON: expert 2 of sparse layer 1 has no slot"),
        ({"physical_to_logical": [[0, 1, 2, 4, 0, 1]] * 3}, "slot 3 of sparse layer 0 holds expert 4, but there are 4"),
        ({"physical_to_logical": SLOTS[:, :4].tolist()}, "it places experts in 4 slots, but there are 6"),
        ({"physical_to_logical": SLOTS[:2].tolist()}, "field 'physical_to_logical' has 2 rows, but the model has 3 sparse layers"),
        ({"physical_to_logical": [[0, 1], [2]]}, "field 'physical_to_logical' has rows of different lengths"),
        ({"physical_to_logical": [0, 1]}, r"field 'physical_to_logical' must have shape \[layers, slots\]"),
        ({"physical_to_logical": [[0.5, 1]]}, "field 'physical_to_logical' must hold whole numbers"),
        ({"physical_to_logical": [["a"]]}, "field 'physical_to_logical' must hold whole numbers"),
        ({"physical_to_logical": SLOTS.tolist(), "layer_ids": [1, 2, 3]}, r"'layer_ids' names layers 1..3 \(3\), but the model's"),
        ({"logical_count": [[1, 2, 3]] * 3}, "field 'logical_count' has 3 experts, but the model has 4"),
        ({"logical_count": [[1, 2, 3, 4]] * 2}, "field 'logical_count' has 2 rows"),
        ({"logical_count": [[1, 2, 3, 4], [1, -2, 3, 4], [1, 1, 1, 1]]}, "holds -2 for expert 1 of row 1"),
        ({"logical_count": 3}, r"'logical_count' must have shape"),
        ({"weights": 1}, r"one of the fields 'physical_to_logical' and 'logical_count' is needed; there are \['weights'\]"),
    ],
)
def test_a_bad_source_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadLocation, match=message):
        load_location(json.dumps(fields), **MODEL, layer_ids=LAYER_IDS, solve=hottest_twice)


def test_a_load_is_refused_where_nothing_solves_and_gpus_where_nothing_says() -> None:
    with pytest.raises(BadLocation, match="field 'logical_count' is a load, but a placement is needed"):
        load_location(json.dumps({"logical_count": [[1, 2, 3, 4]] * 3}), **MODEL)
    with pytest.raises(BadLocation, match="field 'ep_size' is missing"):
        load_location(json.dumps({"physical_to_logical": SLOTS.tolist()}), num_layers=3, num_experts=4)
    with pytest.raises(BadLocation, match="field 'ep_size' must be one number above 0"):
        load_location(json.dumps({"physical_to_logical": SLOTS.tolist(), "ep_size": [0]}), num_layers=3, num_experts=4)


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code in a placement file was run')",))


def test_files_that_are_no_such_files_are_refused_and_never_run(tmp_path: Path) -> None:
    torch.save({"physical_to_logical_map": Exploit()}, tmp_path / "evil.pt")
    torch.save([1], tmp_path / "list.pt")
    np.savez(tmp_path / "evil.npz", physical_to_logical=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("evil.pt", "list.pt", "evil.npz", "text.npz", "text.pt"):
        with pytest.raises(BadLocation, match=f"{name}: not a readable"):
            load_location(tmp_path / name, **MODEL)
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(BadLocation, match=r"text.json: not JSON"):
        load_location(tmp_path / "text.json", **MODEL)
    with pytest.raises(BadLocation, match="no such file"):
        load_location(tmp_path / "absent.json", **MODEL)
    for wrong in ("trival", "a.csv"):
        with pytest.raises(BadLocation, match=rf"{wrong}: expected 'trivial', a \.npz, \.pt or \.json file, or inline JSON"):
            load_location(wrong, **MODEL)
    with pytest.raises(BadLocation, match="inline JSON: not JSON"):
        load_location("{oops", **MODEL)


def test_a_placement_is_saved_only_in_a_form_that_can_be_read_again(tmp_path: Path) -> None:
    with pytest.raises(BadLocation, match=r"must end in \.npz, \.pt or \.json"):
        save_location(location(), tmp_path / "a.txt", layer_ids=LAYER_IDS)
    with pytest.raises(BadLocation, match="2 layer_ids for a placement of 3 layers"):
        save_location(location(), tmp_path / "a.npz", layer_ids=[1, 2])
