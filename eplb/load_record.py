"""Expert load over time as one value, and the two file forms it travels in: our .npz and SGLang's .pt.

Knows arrays and files, not how the load was counted. Both forms hold the same; the .pt has a row for every layer of the
model, dense ones zero, so that SGLang's --init-expert-location reads it:

    field          .npz                                          .pt
    logical_count  int [num_windows, num_layers, num_experts]    int [num_windows, num_hidden_layers, num_experts]
    layer_ids      int [num_layers]                              the same, optional: by default the layers with any load
    num_tokens     int [num_windows]                             the same, optional
    forward_modes  strings [num_windows], optional               the same
    num_dropped    int, optional                                 the same
    model, domain  strings, optional                             the same

A window is a run of steps; a count is how many tokens chose a logical expert in one sparse layer during it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.eplb.array_file import read_fields


class BadLoadRecord(ValueError):  # noqa: N818 - reads as what is wrong
    """A load file that cannot be used: says which file, which field and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class LoadRecord:
    """Tokens per logical expert, sparse layer and window, oldest window first.

    logical_count int64 [num_windows, num_layers, num_experts]; layer_ids int32 [num_layers], ascending model layer
    numbers; num_tokens int64 [num_windows], or None when the file did not say; forward_modes, what each window's one step
    was (prefill, decode, ...), or None when windows are not single steps; num_dropped older windows were recorded but no
    longer held; `model` and `domain` say what was served.
    """

    logical_count: NDArray[np.int64]
    layer_ids: NDArray[np.int32]
    num_tokens: NDArray[np.int64] | None
    model: str = ""
    domain: str = ""
    forward_modes: tuple[str, ...] | None = None
    num_dropped: int = 0

    def save(self, path: str | Path, num_hidden_layers: int | None = None) -> None:
        """Write .npz or .pt, by the name's ending. `num_hidden_layers`: for .pt, else the last sparse layer + 1."""
        path = Path(path)
        if path.suffix == ".npz":
            self._save_npz(path)
        elif path.suffix == ".pt":
            self._save_pt(path, num_hidden_layers)
        else:
            raise BadLoadRecord(f"{path}: the name must end in .npz or .pt")

    def _save_npz(self, path: Path) -> None:
        largest = int(self.logical_count.max(initial=0))
        fields: dict[str, Any] = {
            "logical_count": self.logical_count.astype(np.int32 if largest < 2**31 else np.int64),
            "layer_ids": self.layer_ids,
            "model": np.array(self.model),
            "domain": np.array(self.domain),
            "num_dropped": np.array(self.num_dropped),
        }
        if self.num_tokens is not None:
            fields["num_tokens"] = self.num_tokens
        if self.forward_modes is not None:
            fields["forward_modes"] = np.array(self.forward_modes, dtype=np.str_)
        np.savez_compressed(path, **fields)

    def _save_pt(self, path: Path, num_hidden_layers: int | None) -> None:
        last = int(self.layer_ids.max(initial=-1)) + 1
        num_layers = last if num_hidden_layers is None else num_hidden_layers
        assert num_layers >= last, f"layer {last - 1} does not exist in a model of {num_layers} layers"
        num_windows, _, num_experts = self.logical_count.shape
        counts = torch.zeros(num_windows, num_layers, num_experts, dtype=torch.int64)
        counts[:, torch.from_numpy(self.layer_ids.astype(np.int64))] = torch.from_numpy(self.logical_count)
        fields = {
            "logical_count": counts,
            "layer_ids": torch.from_numpy(self.layer_ids),
            "model": self.model,
            "domain": self.domain,
            "num_dropped": self.num_dropped,
        }
        if self.num_tokens is not None:
            fields["num_tokens"] = torch.from_numpy(self.num_tokens)
        if self.forward_modes is not None:
            fields["forward_modes"] = list(self.forward_modes)
        torch.save(fields, path)


def load(path: str | Path) -> LoadRecord:
    """Read a load file of either form. No code in it is ever run. Raises BadLoadRecord."""
    path = Path(path)
    if path.suffix not in {".npz", ".pt"}:
        raise BadLoadRecord(f"{path}: expected a .npz or .pt file")
    fields = read_fields(path, BadLoadRecord)
    counts = _counts(path, fields)
    layer_ids = _layer_ids(path, fields, counts)
    if path.suffix == ".pt":
        counts = counts[:, layer_ids]
    return LoadRecord(
        logical_count=counts,
        layer_ids=layer_ids,
        num_tokens=_num_tokens(path, fields, len(counts)),
        model=str(fields.get("model", "")),
        domain=str(fields.get("domain", "")),
        forward_modes=_forward_modes(path, fields, len(counts)),
        num_dropped=_num_dropped(path, fields),
    )


def _integers(path: Path, fields: dict[str, Any], name: str) -> NDArray[np.int64]:
    """A field as int64; floats are taken if they are whole numbers (SGLang's counts have been float32 at times)."""
    value = fields[name]
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise BadLoadRecord(f"{path}: field '{name}' must be an array of integers, got {kind}")
    if value.dtype.kind == "f" and not (np.isfinite(value) & (value == np.round(value))).all():
        raise BadLoadRecord(f"{path}: field '{name}' holds values that are not whole numbers")
    return value.astype(np.int64)


def _counts(path: Path, fields: dict[str, Any]) -> NDArray[np.int64]:
    """`logical_count` with its windows axis (SGLang also writes one window without it)."""
    if "logical_count" not in fields:
        raise BadLoadRecord(f"{path}: field 'logical_count' is missing; there are {sorted(map(str, fields))}")
    counts = _integers(path, fields, "logical_count")
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or 0 in counts.shape:
        expected = "[num_windows, num_layers, num_experts], none of them 0"
        raise BadLoadRecord(f"{path}: field 'logical_count' must have shape {expected}, got {list(counts.shape)}")
    if counts.min() < 0:
        raise BadLoadRecord(f"{path}: field 'logical_count' holds negative counts")
    return counts


def _layer_ids(path: Path, fields: dict[str, Any], counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """The model layers of the counts, ascending: one per row (.npz), or naming rows (.pt, where they are optional)."""
    if "layer_ids" not in fields:
        if path.suffix == ".npz":
            raise BadLoadRecord(f"{path}: field 'layer_ids' is missing; there are {sorted(fields)}")
        loaded = np.flatnonzero(counts.any(axis=(0, 2))).astype(np.int32)
        if not len(loaded):
            raise BadLoadRecord(f"{path}: field 'logical_count' is all zero, so no layer is known to be sparse")
        return loaded
    layer_ids = _integers(path, fields, "layer_ids")
    num_rows = counts.shape[1]
    if layer_ids.ndim != 1 or not len(layer_ids) or layer_ids[0] < 0 or (np.diff(layer_ids) <= 0).any():
        raise BadLoadRecord(f"{path}: field 'layer_ids' must be ascending layer numbers, got {layer_ids.tolist()}")
    if path.suffix == ".npz" and len(layer_ids) != num_rows:
        raise BadLoadRecord(f"{path}: field 'layer_ids' names {len(layer_ids)} layers, 'logical_count' has {num_rows}")
    if path.suffix == ".pt" and layer_ids[-1] >= num_rows:
        raise BadLoadRecord(f"{path}: field 'layer_ids' names layer {layer_ids[-1]}, 'logical_count' has {num_rows}")
    return layer_ids.astype(np.int32)


def _num_tokens(path: Path, fields: dict[str, Any], num_windows: int) -> NDArray[np.int64] | None:
    if "num_tokens" not in fields:
        return None
    num_tokens = _integers(path, fields, "num_tokens")
    if num_tokens.shape != (num_windows,) or num_tokens.min() < 0:
        raise BadLoadRecord(f"{path}: field 'num_tokens' must be {num_windows} counts, got {num_tokens.tolist()[:8]}")
    return num_tokens


def _forward_modes(path: Path, fields: dict[str, Any], num_windows: int) -> tuple[str, ...] | None:
    if "forward_modes" not in fields:
        return None
    modes = np.asarray(fields["forward_modes"])
    if modes.shape != (num_windows,) or modes.dtype.kind != "U":
        got = f"{modes.dtype} {list(modes.shape)}"
        raise BadLoadRecord(f"{path}: field 'forward_modes' must be {num_windows} strings, got {got}")
    return tuple(modes.tolist())


def _num_dropped(path: Path, fields: dict[str, Any]) -> int:
    num_dropped = np.asarray(fields.get("num_dropped", 0))
    if num_dropped.ndim or num_dropped.dtype.kind not in "iu" or num_dropped < 0:
        raise BadLoadRecord(f"{path}: field 'num_dropped' must be a number of windows, got {num_dropped.tolist()}")
    return int(num_dropped)
