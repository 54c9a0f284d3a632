"""Whether a checkpoint folder is complete: every file whole, every tensor that the model needs there with its shape.

Reads the index and the files' headers alone, no weight, and needs no torch. Knows nothing of layouts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.launch.models.config import ModelConfig
from moesaic.launch.models.tensors import FP8_BLOCK, TensorSpec, model_tensors

FP8_NAME = "F8_E4M3"
INDEX = "model.safetensors.index.json"
Headers = dict[str, dict[str, Any]]


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or doesn't fit its config; names file and tensor."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """`problems`: what is missing or damaged, by file and tensor; none: complete. `digest`: of the files' names and sizes."""

    num_files: int
    num_bytes: int
    problems: tuple[str, ...]
    digest: str


def inspect_checkpoint(folder: Path, model: ModelConfig) -> CheckpointFiles:
    """Look at every file that the index names (or at all, where there is none)."""
    problems: list[str] = []
    headers: dict[str, Headers] = {}
    sizes: dict[str, int] = {}
    try:
        weight_map, names = _files(folder)
    except (CheckpointError, OSError) as error:
        return CheckpointFiles(num_files=0, num_bytes=0, problems=(str(error),), digest="")
    for name in names:
        try:
            sizes[name] = (folder / name).stat().st_size
            headers[name] = read_header(folder / name)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
    if weight_map is None:
        weight_map = {tensor: name for name, header in headers.items() for tensor in header}
    for spec in model_tensors(model):
        problems.extend(_tensor_problems(folder, spec, weight_map, headers))
    return CheckpointFiles(
        num_files=len(names), num_bytes=sum(sizes.values()), problems=tuple(dict.fromkeys(problems)), digest=_digest(sizes)
    )


def read_header(path: Path) -> Headers:
    """A safetensors file's tensors: dtype, shape and place. Raises CheckpointError for a file that is cut off or is none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise CheckpointError(f"{path}: {size:,} bytes, not a whole safetensors file; download it again")
        try:
            header: Headers = json.loads(file.read(length))
            header.pop("__metadata__", None)
            promised = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if size != promised:
        raise CheckpointError(f"{path}: {size:,} bytes where its header promises {promised:,}; download it again")
    return header


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from `model.safetensors.index.json`. Raises CheckpointError for another file."""
    try:
        raw = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{index} is not valid JSON: {error}") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor to file name")
    return weight_map


def _files(folder: Path) -> tuple[dict[str, str] | None, list[str]]:
    index = folder / INDEX
    if index.is_file():
        weight_map = read_weight_map(index)
        return weight_map, sorted(set(weight_map.values()))
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"{folder} holds no safetensors; for random weights use --load-format dummy")
    return None, names


def _tensor_problems(folder: Path, spec: TensorSpec, weight_map: dict[str, str], headers: dict[str, Headers]) -> Iterator[str]:
    file = weight_map.get(spec.name)
    if file is None:
        yield f"{folder}: tensor {spec.name} is in none of its files"
        return
    if file not in headers:  # a damaged file was named already
        return
    stored = headers[file].get(spec.name)
    if stored is None:
        yield f"{folder / file}: tensor {spec.name} is not in it, as {INDEX} says"
        return
    if tuple(stored["shape"]) != spec.shape:
        yield f"{folder / file}: {spec.name} has shape {stored['shape']}, the config asks for {list(spec.shape)}"
    if stored["dtype"] == FP8_NAME:
        scales = tuple(-(-size // FP8_BLOCK) for size in spec.shape)
        yield from _tensor_problems(
            folder, TensorSpec(name=f"{spec.name}_scale_inv", shape=scales, kind=spec.kind), weight_map, headers
        )


def _digest(sizes: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16]
