"""Placements in files: what `--init-expert-location` takes, and how an `ExpertLocation` is written down.

A source is the word `trivial`, a file (.npz, .pt or .json), or inline JSON. A file or inline JSON says either where every expert
lies, or how the load was, from which the caller's `solve` makes a placement:

    field                .npz, .json                        .pt (SGLang's form: a row for every layer of the model)
    physical_to_logical  int [num_layers, num_slots]        physical_to_logical_map int [num_hidden_layers, num_slots]
    or logical_count     int [(windows,) layers, experts]   int [(windows,) num_hidden_layers, num_experts]
    layer_ids            int [num_layers], optional         the same, optional
    ep_size, num_nodes   int, optional: what the placement was made for

Both names of the map are read in every form. Rows belong to sparse layers when there are as many; when there are more, they belong
to all layers of the model, and `layer_ids` says which of them are sparse.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.eplb.array_file import read_fields
from moesaic.eplb.location import BadLocation, ExpertLocation, Int64Array

Solve = Callable[[Int64Array], Int64Array]
"""Load int64 [L, E] -> physical_to_logical int64 [L, R]."""

_MAP_FIELDS = ("physical_to_logical", "physical_to_logical_map")
_LOAD_FIELD = "logical_count"
_SUFFIXES = (".npz", ".pt", ".json")


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What was read: `name` for messages, and its fields."""

    name: str
    fields: dict[str, Any]

    def bad(self, problem: str) -> BadLocation:
        return BadLocation(f"{self.name}: {problem}")

    def integers(self, field: str) -> Int64Array:
        """A field as int64; floats are taken if they are whole numbers."""
        try:
            values = np.asarray(self.fields[field])
        except ValueError as error:
            raise self.bad(f"field '{field}' has rows of different lengths") from error
        if values.dtype.kind not in "iuf" or not (np.isfinite(values) & (values == np.floor(values))).all():
            raise self.bad(f"field '{field}' must hold whole numbers")
        return values.astype(np.int64)

    def integer(self, field: str) -> int | None:
        if field not in self.fields:
            return None
        values = self.integers(field)
        if values.size != 1 or values.min() < 1:
            raise self.bad(f"field '{field}' must be one number above 0, got {values.tolist()}")
        return int(values.item())


def load_location(
    source: str | Path,
    *,
    num_layers: int,
    num_experts: int,
    num_slots: int | None = None,
    ep_size: int | None = None,
    num_nodes: int | None = None,
    layer_ids: Sequence[int] | None = None,
    solve: Solve | None = None,
) -> ExpertLocation:
    """The placement a source describes, for a model of `num_layers` sparse layers of `num_experts` experts.

    num_slots, ep_size, num_nodes: what the server has; None takes the file's own. layer_ids: the model's sparse layer numbers,
    needed when the source has a row for every layer of the model and doesn't name the sparse ones itself. solve makes the placement
    when the source holds a load, which is summed over its windows. Raises BadLocation that names the source and the field, layer,
    slot or expert.
    """
    if str(source) == "trivial":
        if num_slots is None or ep_size is None:
            raise BadLocation("the trivial placement needs a number of slots and of GPUs")
        return ExpertLocation.trivial(
            num_layers=num_layers, num_experts=num_experts, num_slots=num_slots, ep_size=ep_size, num_nodes=num_nodes or 1
        )
    read = _read(source)
    ep_size = ep_size or read.integer("ep_size")
    if ep_size is None:
        raise read.bad("field 'ep_size' is missing, so the number of GPUs must be given")
    slots = _slots(read, num_layers=num_layers, num_experts=num_experts, layer_ids=layer_ids, solve=solve)
    if num_slots is not None and slots.shape[1] != num_slots:
        raise read.bad(f"it places experts in {slots.shape[1]} slots, but there are {num_slots}")
    try:
        return ExpertLocation(
            physical_to_logical=slots,
            num_experts=num_experts,
            ep_size=ep_size,
            num_nodes=num_nodes or read.integer("num_nodes") or 1,
        )
    except BadLocation as error:
        raise read.bad(str(error)) from error


def save_location(
    location: ExpertLocation, path: str | Path, *, layer_ids: Sequence[int], num_hidden_layers: int | None = None
) -> None:
    """Write .npz, .json or SGLang's .pt, by the name's ending. layer_ids: the model layer of every row, ascending.

    .pt has a row for every layer of the model (`num_hidden_layers`, else the last sparse layer + 1), a dense layer's being trivial,
    as SGLang has it.
    """
    path = Path(path)
    if len(layer_ids) != location.num_layers:
        raise BadLocation(f"{path}: {len(layer_ids)} layer_ids for a placement of {location.num_layers} layers")
    sizes = {"num_experts": location.num_experts, "ep_size": location.ep_size, "num_nodes": location.num_nodes}
    ids = np.asarray(layer_ids, dtype=np.int32)
    match path.suffix:
        case ".npz":
            arrays: dict[str, Any] = {"physical_to_logical": location.physical_to_logical, "layer_ids": ids, **sizes}
            np.savez_compressed(path, **arrays)
        case ".json":
            fields = {"physical_to_logical": location.physical_to_logical.tolist(), "layer_ids": ids.tolist(), **sizes}
            path.write_text(json.dumps(fields) + "\n", encoding="utf-8")
        case ".pt":
            import torch

            num_rows = int(ids[-1]) + 1 if num_hidden_layers is None else num_hidden_layers
            assert num_rows > ids[-1], f"layer {ids[-1]} does not exist in a model of {num_rows} layers"
            slots = np.tile(np.arange(location.num_slots) % location.num_experts, (num_rows, 1))
            slots[ids] = location.physical_to_logical
            torch.save({"physical_to_logical_map": torch.from_numpy(slots), "layer_ids": torch.from_numpy(ids), **sizes}, path)
        case _:
            raise BadLocation(f"{path}: the name must end in .npz, .pt or .json")


def _read(source: str | Path) -> _Source:
    text = str(source)
    if text.lstrip().startswith("{"):
        return _Source(name="inline JSON", fields=_parse_json("inline JSON", text))
    path = Path(source)
    if path.suffix not in _SUFFIXES:
        raise BadLocation(f"{source}: expected 'trivial', a .npz, .pt or .json file, or inline JSON that begins with {{")
    if path.suffix != ".json":
        return _Source(name=str(path), fields=read_fields(path, BadLocation))
    if not path.is_file():
        raise BadLocation(f"{path}: no such file")
    return _Source(name=str(path), fields=_parse_json(str(path), path.read_bytes()))


def _parse_json(name: str, text: str | bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise BadLocation(f"{name}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadLocation(f"{name}: must be a JSON object, got {type(fields).__name__}")
    return fields


def _slots(read: _Source, *, num_layers: int, num_experts: int, layer_ids: Sequence[int] | None, solve: Solve | None) -> Int64Array:
    """physical_to_logical of the sparse layers, read or solved for."""
    map_field = next((field for field in _MAP_FIELDS if field in read.fields), None)
    if map_field is not None:
        slots = read.integers(map_field)
        if slots.ndim != 2 or 0 in slots.shape:
            raise read.bad(f"field '{map_field}' must have shape [layers, slots], got {list(slots.shape)}")
        return _sparse_rows(read, map_field, slots, num_layers, layer_ids)
    if _LOAD_FIELD not in read.fields:
        present = sorted(map(str, read.fields))
        raise read.bad(f"one of the fields 'physical_to_logical' and 'logical_count' is needed; there are {present}")
    if solve is None:
        raise read.bad(f"field '{_LOAD_FIELD}' is a load, but a placement is needed here ('physical_to_logical')")
    return solve(_load(read, num_layers=num_layers, num_experts=num_experts, layer_ids=layer_ids))


def _load(read: _Source, *, num_layers: int, num_experts: int, layer_ids: Sequence[int] | None) -> Int64Array:
    counts = read.integers(_LOAD_FIELD)
    if counts.ndim == 3:
        counts = counts.sum(axis=0)
    if counts.ndim != 2 or 0 in counts.shape:
        raise read.bad(f"field '{_LOAD_FIELD}' must have shape [(windows,) layers, experts], got {list(counts.shape)}")
    if counts.shape[1] != num_experts:
        raise read.bad(f"field '{_LOAD_FIELD}' has {counts.shape[1]} experts, but the model has {num_experts}")
    if counts.min() < 0:
        layer, expert = np.argwhere(counts < 0)[0].tolist()
        raise read.bad(f"field '{_LOAD_FIELD}' holds {counts[layer, expert]} for expert {expert} of row {layer}")
    return _sparse_rows(read, _LOAD_FIELD, counts, num_layers, layer_ids)


def _sparse_rows(read: _Source, field: str, rows: Int64Array, num_layers: int, layer_ids: Sequence[int] | None) -> Int64Array:
    """The rows of the model's sparse layers, of a field with a row for each of them or for each layer of the model."""
    named = read.integers("layer_ids").tolist() if "layer_ids" in read.fields else None
    wanted = list(layer_ids) if layer_ids is not None else named
    if named is not None and named != wanted:
        raise read.bad(f"field 'layer_ids' names layers {_span(named)}, but the model's sparse layers are {_span(wanted or [])}")
    if wanted is not None and len(wanted) != num_layers:
        raise read.bad(f"field 'layer_ids' names {len(wanted)} layers, but the model has {num_layers} sparse layers")
    if len(rows) == num_layers:
        return rows
    if wanted is None or len(rows) <= max(wanted):
        raise read.bad(f"field '{field}' has {len(rows)} rows, but the model has {num_layers} sparse layers")
    return rows[wanted]


def _span(layer_ids: list[int]) -> str:
    return f"{layer_ids[0]}..{layer_ids[-1]} ({len(layer_ids)})" if layer_ids else "none"
