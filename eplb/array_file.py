"""Named arrays in a .npz file or in SGLang's .pt form (a dict of tensors), as plain fields. No code in a file is ever run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_UNREADABLE = (OSError, ValueError, TypeError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError)


def read_fields(path: Path, error: type[ValueError]) -> dict[str, Any]:
    """The fields of a file by its ending, tensors as numpy arrays. Raises `error` naming the file when it is no such file."""
    if not path.is_file():
        raise error(f"{path}: no such file")
    try:
        return _read_pt(path) if path.suffix == ".pt" else _read_npz(path)
    except _UNREADABLE as cause:
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise error(f"{path}: not a readable {path.suffix} file: {reason}") from cause


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _read_pt(path: Path) -> dict[str, Any]:
    import torch

    fields = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(fields, dict):
        raise ValueError(f"it holds a {type(fields).__name__}, not a dict")
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in fields.items()}
