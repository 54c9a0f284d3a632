"""Where weights come from: a checkpoint folder of safetensors, or deterministic dummies.

A model pulls what it needs, by the checkpoint's own names and as the shard it wants; nothing else is read. Files are memory-mapped,
so a rank's peak is its own weights plus one tensor. FP8 weights (e4m3 with `weight_scale_inv` per 128x128 block) are dequantised on
the way in, or given out as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.kernels.quant import BLOCK, FP8, dequantize_blocks, quantize_blocks
from moesaic.launch.models.checkpoint_files import CheckpointError, read_weight_map

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a weight may be stored in without scales."""


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts along `dim`."""

    dim: int
    index: int
    count: int

    def bounds(self, size: int) -> tuple[int, int]:
        """[start, stop) along dim. Raises ValueError when size isn't a multiple of count."""
        if size % self.count:
            raise ValueError(f"a dimension of {size} can't be split into {self.count} equal parts")
        part = size // self.count
        return self.index * part, (self.index + 1) * part


class WeightSource(Protocol):
    """Gives tensors by checkpoint name, in the dtype asked for."""

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, shard: Shard | None = None) -> Tensor:
        """The tensor (its shard); `shape` is that of the whole tensor. Raises CheckpointError."""
        ...

    def quantized(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> tuple[Tensor, Tensor]:
        """An FP8 matrix as stored, of whole blocks: e4m3, and the fp32 scales of its 128x128 blocks. Raises CheckpointError."""
        ...


class DummyWeights:
    """Random weights without a file (`--load-format dummy`): each tensor depends on its name alone, so all layouts agree."""

    def __init__(self, on_tensor: Callable[[int], None] = lambda num_bytes: None) -> None:
        self._on_tensor = on_tensor

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, shard: Shard | None = None) -> Tensor:
        value = self._random(name, shape, dtype, shard)
        self._on_tensor(value.nbytes)
        return value

    def quantized(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> tuple[Tensor, Tensor]:
        values, scales = quantize_blocks(self._random(name, shape, torch.float32, shard))
        self._on_tensor(values.nbytes + scales.nbytes)
        return values, scales

    def _random(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, shard: Shard | None) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        generator = torch.Generator().manual_seed(seed)
        if name.endswith(("norm.weight", "layernorm.weight")):
            whole = torch.ones(shape)
        elif len(shape) == 1:
            whole = torch.zeros(shape)
        else:
            whole = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return _cut(whole, shard).to(dtype).clone()


class CheckpointWeights:
    """A folder of safetensors, with or without an index. `on_tensor` is called with the bytes of each tensor given out."""

    def __init__(self, folder: str | Path, on_tensor: Callable[[int], None] = lambda num_bytes: None) -> None:
        self._folder = Path(folder)
        self._on_tensor = on_tensor
        self._files: dict[str, Any] = {}
        self._file_of = self._index()

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, shard: Shard | None = None) -> Tensor:
        value = self._stored(name, shape, shard)
        if value.dtype == FP8:
            scales, starts = self._scales(name, shape, shard)
            row, column = (start % BLOCK for start in starts)
            value = dequantize_blocks(value, scales, dtype, row_offset=row, column_offset=column)
        elif value.dtype in PLAIN_DTYPES:
            value = value.to(dtype, copy=True)
        else:
            raise CheckpointError(f"{self._path(name)}: {name} has dtype {value.dtype}, which is no weight dtype")
        self._on_tensor(value.nbytes)
        return value

    def quantized(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> tuple[Tensor, Tensor]:
        value = self._stored(name, shape, shard)
        if value.dtype != FP8:
            raise CheckpointError(
                f"{self._path(name)}: {name} has dtype {value.dtype}, wanted {FP8} with scales; use --quantization none"
            )
        scales, starts = self._scales(name, shape, shard)
        if any(start % BLOCK for start in starts):
            raise CheckpointError(
                f"{self._path(name)}: {name} is cut at {starts}, inside an FP8 block of {BLOCK}: cut it into fewer parts"
            )
        value, scales = value.clone(), scales.contiguous()
        self._on_tensor(value.nbytes + scales.nbytes)
        return value, scales

    def _stored(self, name: str, shape: tuple[int, ...], shard: Shard | None) -> Tensor:
        stored = self._slice(name)
        found = tuple(stored.get_shape())
        if found != shape:
            raise CheckpointError(f"{self._path(name)}: {name} has shape {list(found)}, the config asks for {list(shape)}")
        return _cut(stored, shard)

    def _scales(self, name: str, shape: tuple[int, ...], shard: Shard | None) -> tuple[Tensor, list[int]]:
        """Scales of the blocks that an FP8 shard touches, and where it starts."""
        if len(shape) != 2:
            raise CheckpointError(f"{self._path(name)}: {name} is FP8 with shape {list(shape)}; only matrices have scale blocks")
        starts, stops = [0, 0], list(shape)
        if shard is not None:
            starts[shard.dim], stops[shard.dim] = shard.bounds(shape[shard.dim])
        scale_name = f"{name}_scale_inv"
        stored = self._slice(scale_name)
        wanted = [-(-size // BLOCK) for size in shape]
        if list(stored.get_shape()) != wanted:
            raise CheckpointError(
                f"{self._path(scale_name)}: {scale_name} has shape {stored.get_shape()}, "
                f"128x128 blocks of {list(shape)} ask for {wanted}"
            )
        blocks = [slice(start // BLOCK, -(-stop // BLOCK)) for start, stop in zip(starts, stops, strict=True)]
        return stored[blocks[0], blocks[1]].float(), starts

    def _slice(self, name: str) -> Any:
        file_name = self._file_of.get(name)
        if file_name is None:
            raise CheckpointError(f"{self._folder}: tensor {name} is in none of its {len(set(self._file_of.values()))} files")
        try:
            if file_name not in self._files:
                self._files[file_name] = safe_open(self._folder / file_name, framework="pt")
            return self._files[file_name].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._folder / file_name}: can't read {name}: {error}") from error

    def _path(self, name: str) -> Path:
        return self._folder / self._file_of[name]

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self._folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_weight_map(index)
            missing = sorted({name for name in weight_map.values() if not (self._folder / name).is_file()})
            if missing:
                raise CheckpointError(f"{index} names {missing[0]}, which is missing ({len(missing)} file(s) missing)")
            return weight_map
        files = sorted(self._folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self._folder} holds no safetensors; for random weights use --load-format dummy")
        return {name: file.name for file in files for name in self._names(file)}

    def _names(self, file: Path) -> list[str]:
        try:
            self._files[file.name] = safe_open(file, framework="pt")
            return list(self._files[file.name].keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error


def _cut(value: Any, shard: Shard | None) -> Tensor:
    """A shard of a tensor or of a safetensors slice (which reads only what is cut)."""
    if shard is None:
        whole: Tensor = value[:]
        return whole
    size = (value.get_shape() if hasattr(value, "get_shape") else value.shape)[shard.dim]
    start, stop = shard.bounds(size)
    part: Tensor = value[start:stop] if shard.dim == 0 else value[:, start:stop]
    return part
