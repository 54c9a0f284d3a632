"""Weights by name: a shard is a slice of the whole, from files or dummies; damage is refused, with file and tensor named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moesaic.kernels.quant import dequantize_blocks, quantize_blocks
from moesaic.launch.models.checkpoint_files import CheckpointError
from moesaic.launch.models.weights import CheckpointWeights, DummyWeights, Shard

SHAPE = (8, 12)
FP8_SHAPE = (384, 320)
"""Three row blocks, two and a half column blocks; halves and quarters cut blocks in the middle."""


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files: plain tensors in the first, an FP8 weight with its scales in the second."""
    quantized, scales = quantize_blocks(_random(*FP8_SHAPE))
    save_file({"matrix": _random(*SHAPE), "vector": _random(12), "half": _random(*SHAPE).bfloat16()}, tmp_path / "a.safetensors")
    save_file({"fp8.weight": quantized, "fp8.weight_scale_inv": scales}, tmp_path / "b.safetensors")
    return tmp_path


def _write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _truncate(path: Path, num_bytes: int) -> None:
    data = path.read_bytes()
    assert num_bytes < len(data)
    path.write_bytes(data[:num_bytes])


@pytest.mark.parametrize("name", ["matrix", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_comes_whole_and_in_the_dtype_asked_for(folder: Path, name: str, dtype: torch.dtype) -> None:
    stored = _random(*SHAPE).to(torch.bfloat16 if name == "half" else torch.float32)
    value = CheckpointWeights(folder).tensor(name, SHAPE, dtype)
    assert value.dtype == dtype
    assert torch.equal(value, stored.to(dtype))


@pytest.mark.parametrize(("dim", "count"), [(0, 1), (0, 2), (0, 8), (1, 2), (1, 3), (1, 12)])
@pytest.mark.parametrize("name", ["matrix", "half"])
def test_a_shard_is_a_slice_of_the_whole(folder: Path, name: str, dim: int, count: int) -> None:
    source = CheckpointWeights(folder)
    whole = source.tensor(name, SHAPE, torch.float32)
    shards = [source.tensor(name, SHAPE, torch.float32, Shard(dim, index, count)) for index in range(count)]
    assert torch.equal(torch.cat(shards, dim=dim), whole)
    assert len({shard.shape for shard in shards}) == 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_vector_is_cut_too(folder: Path, count: int) -> None:
    source = CheckpointWeights(folder)
    shards = [source.tensor("vector", (12,), torch.float32, Shard(0, index, count)) for index in range(count)]
    assert torch.equal(torch.cat(shards), _random(12))


@pytest.mark.parametrize(("dim", "count"), [(0, 1), (0, 2), (0, 3), (0, 4), (0, 12), (1, 2), (1, 4), (1, 5), (1, 20)])
def test_an_fp8_shard_is_a_slice_of_the_dequantised_whole_also_inside_blocks(folder: Path, dim: int, count: int) -> None:
    source = CheckpointWeights(folder)
    whole = dequantize_blocks(*quantize_blocks(_random(*FP8_SHAPE)), torch.float32)
    assert torch.equal(source.tensor("fp8.weight", FP8_SHAPE, torch.float32), whole)
    shards = [source.tensor("fp8.weight", FP8_SHAPE, torch.float32, Shard(dim, index, count)) for index in range(count)]
    assert torch.equal(torch.cat(shards, dim=dim), whole)


def test_what_is_given_out_is_the_callers_own_and_is_counted(folder: Path) -> None:
    counted: list[int] = []
    source = CheckpointWeights(folder, counted.append)
    source.tensor("matrix", SHAPE, torch.float32).zero_()
    source.tensor("matrix", SHAPE, torch.float32, Shard(0, 0, 2)).zero_()
    assert torch.equal(source.tensor("matrix", SHAPE, torch.float32), _random(*SHAPE))
    source.tensor("fp8.weight", FP8_SHAPE, torch.bfloat16, Shard(1, 0, 2))
    assert counted == [384, 192, 384, 384 * 320]


def test_a_dimension_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="a dimension of 10 can't be split into 4 equal parts"):
        Shard(0, 1, 4).bounds(10)


def test_an_index_says_where_tensors_are(folder: Path) -> None:
    _write_index(folder, {"matrix": "a.safetensors"})
    source = CheckpointWeights(folder)
    assert torch.equal(source.tensor("matrix", SHAPE, torch.float32), _random(*SHAPE))
    with pytest.raises(CheckpointError, match="tensor vector is in none of its 1 files"):
        source.tensor("vector", (12,), torch.float32)


def test_a_file_of_the_index_that_is_missing_is_named_before_anything_is_read(folder: Path) -> None:
    _write_index(folder, {"matrix": "a.safetensors", "fp8.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors, which is missing"):
        CheckpointWeights(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"matrix": 3}}', "\udcff"])
def test_a_broken_index_is_refused_and_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        CheckpointWeights(folder)


def test_a_tensor_that_the_index_puts_into_the_wrong_file_names_both(folder: Path) -> None:
    _write_index(folder, {"matrix": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"b\.safetensors: can't read matrix"):
        CheckpointWeights(folder).tensor("matrix", SHAPE, torch.float32)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1, -200], ids=["empty", "length", "no header", "header", "data", "more data"])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_truncated_file_is_refused_with_its_name(folder: Path, keep: int, indexed: bool) -> None:
    path = folder / "a.safetensors"
    _truncate(path, keep % path.stat().st_size)
    if indexed:
        _write_index(folder, {"matrix": "a.safetensors", "fp8.weight": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"a\.safetensors: .*" + ("matrix" if indexed else "not a readable")):
        CheckpointWeights(folder).tensor("matrix", SHAPE, torch.float32)


def test_a_missing_tensor_names_folder_and_tensor(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        CheckpointWeights(folder).tensor("model.norm.weight", (12,), torch.float32)
    assert str(folder) in str(caught.value)
    assert "model.norm.weight is in none of its 2 files" in str(caught.value)


@pytest.mark.parametrize("shape", [(12, 8), (8,), (8, 12, 1), (8, 13)])
def test_a_wrong_shape_names_file_tensor_and_both_shapes(folder: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        CheckpointWeights(folder).tensor("matrix", shape, torch.float32)
    for part in ("a.safetensors", "matrix", "[8, 12]", str(list(shape))):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e5m2])
def test_a_dtype_that_is_no_weight_is_refused_naming_file_and_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"odd": torch.ones(2, 2).to(dtype)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=rf"odd\.safetensors: odd has dtype {dtype}"):
        CheckpointWeights(tmp_path).tensor("odd", (2, 2), torch.float32)


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors["w_scale_inv"]


def _shrink(tensors: dict[str, Tensor]) -> None:
    tensors["w_scale_inv"] = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("damage", "message"), [(_drop, "tensor w_scale_inv is in none"), (_shrink, r"has shape \[1, 1\].*\[2, 1\]")]
)
def test_fp8_without_fitting_scales_is_refused(tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str) -> None:
    quantized, scales = quantize_blocks(_random(130, 100))
    tensors = {"w": quantized, "w_scale_inv": scales}
    damage(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        CheckpointWeights(tmp_path).tensor("w", (130, 100), torch.float32)


def test_an_fp8_vector_has_no_blocks_and_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.safetensors: w "):
        CheckpointWeights(tmp_path).tensor("w", (4,), torch.float32)


def test_a_folder_without_safetensors_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no safetensors; .*--load-format dummy"):
        CheckpointWeights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        CheckpointWeights(tmp_path)


@pytest.mark.parametrize(("dim", "count"), [(0, 2), (0, 4), (1, 3), (1, 12)])
def test_dummy_weights_are_equal_in_every_sharding(dim: int, count: int) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    whole = DummyWeights().tensor(name, SHAPE, torch.float32)
    shards = [DummyWeights().tensor(name, SHAPE, torch.float32, Shard(dim, index, count)) for index in range(count)]
    assert torch.equal(torch.cat(shards, dim=dim), whole)


def test_dummy_weights_depend_on_the_name_alone_and_not_on_the_order_of_calls() -> None:
    one, other = DummyWeights(), DummyWeights()
    first = one.tensor("a.weight", SHAPE, torch.float32)
    assert not torch.equal(first, one.tensor("b.weight", SHAPE, torch.float32))
    other.tensor("b.weight", SHAPE, torch.float32)
    assert torch.equal(other.tensor("a.weight", SHAPE, torch.float32), first)


def test_dummy_norms_are_one_and_biases_zero_and_bytes_are_counted() -> None:
    counted: list[int] = []
    source = DummyWeights(counted.append)
    assert torch.equal(source.tensor("model.norm.weight", (6,), torch.float32), torch.ones(6))
    assert torch.equal(source.tensor("model.layers.0.input_layernorm.weight", (6,), torch.float32), torch.ones(6))
    assert torch.equal(source.tensor("mlp.gate.e_score_correction_bias", (6,), torch.float32), torch.zeros(6))
    source.tensor("a.weight", SHAPE, torch.bfloat16, Shard(0, 0, 2))
    assert counted == [24, 24, 24, 96]
