"""Building a rank: it reads its own experts and shards and nothing else, holds little more than them, and refuses by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BASE, TinyModel
from torch import Tensor

from moesaic.attention.backend import KernelBackend
from moesaic.launch.models.build import DeepseekV3Builder
from moesaic.launch.models.checkpoint_files import CheckpointError
from moesaic.launch.models.config import ModelConfig, load_model_config
from moesaic.launch.models.options import BuildOptions
from moesaic.launch.models.parallel import ParallelContext
from moesaic.launch.models.weights import CheckpointWeights, DummyWeights, Shard, WeightSource

Tiny = Callable[..., TinyModel]
EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Listening:
    """A weight source that notes the name, shard and bytes of what it gives out."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.asked: list[tuple[str, Shard | None]] = []
        self.num_bytes = 0

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, shard: Shard | None = None) -> Tensor:
        self.asked.append((name, shard))
        value = self._source.tensor(name, shape, dtype, shard)
        self.num_bytes += value.nbytes
        return value

    def quantized(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> tuple[Tensor, Tensor]:
        self.asked.append((name, shard))
        values, scales = self._source.quantized(name, shape, shard)
        self.num_bytes += values.nbytes + scales.nbytes
        return values, scales

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.asked]

    @property
    def experts(self) -> set[int]:
        return {int(match[1]) for name in self.names if (match := EXPERT.search(name))}


def _build(config: ModelConfig, source: WeightSource, **parallel: Any) -> None:
    options = BuildOptions(max_positions=64)
    DeepseekV3Builder(config, source, ParallelContext(**parallel), KernelBackend(), options).build()


@pytest.mark.parametrize("variant", ["plain", "fp8", "tied", "kimi"])
def test_one_rank_reads_every_tensor_of_the_checkpoint_once(tiny: Tiny, variant: str) -> None:
    folder = tiny(variant).folder
    source = Listening(CheckpointWeights(folder))
    _build(load_model_config(folder), source)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {name for name in weight_map if not name.endswith("_scale_inv")}
    assert set(source.names) == stored
    twice = {name for name in source.names if source.names.count(name) > 1}
    assert twice == ({"model.embed_tokens.weight"} if variant == "tied" else set())


@pytest.mark.parametrize(("ep_size", "ep_rank"), [(2, 0), (2, 1), (4, 2), (16, 15)])
def test_a_rank_reads_only_its_own_experts(tiny: Tiny, ep_size: int, ep_rank: int) -> None:
    folder = tiny("plain").folder
    source = Listening(CheckpointWeights(folder))
    _build(load_model_config(folder), source, world_size=ep_size, rank=ep_rank, ep_size=ep_size, ep_rank=ep_rank)
    share = 16 // ep_size
    assert source.experts == set(range(ep_rank * share, (ep_rank + 1) * share))


def test_the_experts_of_all_ranks_are_all_experts_and_each_has_one_rank(tiny: Tiny) -> None:
    folder = tiny("plain").folder
    seen: list[int] = []
    for rank in range(4):
        source = Listening(CheckpointWeights(folder))
        _build(load_model_config(folder), source, world_size=4, rank=rank, ep_size=4, ep_rank=rank)
        seen += source.experts
    assert sorted(seen) == list(range(16))


def test_tensor_parallel_ranks_read_their_slices_of_heads_experts_and_vocabulary(tiny: Tiny) -> None:
    folder = tiny("plain").folder
    source = Listening(CheckpointWeights(folder))
    group = torch.distributed.ProcessGroup(0, 2)
    _build(
        load_model_config(folder), source, world_size=2, rank=1, attn_tp_size=2, attn_tp_rank=1, attn_tp_group=group,
        moe_tp_size=2, moe_tp_rank=1,
    )  # fmt: skip
    shards = dict(source.asked)
    rows, columns = Shard(0, 1, 2), Shard(1, 1, 2)
    attention, experts = "model.layers.1.self_attn", "model.layers.1.mlp.experts.7"
    assert shards[f"{attention}.q_b_proj.weight"] == shards[f"{attention}.kv_b_proj.weight"] == rows
    assert shards[f"{attention}.o_proj.weight"] == columns
    assert shards[f"{experts}.gate_proj.weight"] == shards[f"{experts}.up_proj.weight"] == rows
    assert shards[f"{experts}.down_proj.weight"] == columns
    assert shards["lm_head.weight"] == rows
    assert shards[f"{attention}.kv_a_proj_with_mqa.weight"] is None, "the latent is shared by all heads"
    assert source.experts == set(range(16))


@pytest.fixture
def damaged(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a checkpoint to break."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny("plain").folder, folder)
    return folder


def _edit(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> str:
    """Replace (or drop) a tensor, also in the index; returns its file's name."""
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    file: str = raw["weight_map"][name]
    tensors = load_file(folder / file)
    changed = change(tensors.pop(name))
    if changed is None:
        del raw["weight_map"][name]
    else:
        tensors[name] = changed.contiguous()
    save_file(tensors, folder / file)
    index.write_text(json.dumps(raw))
    return file


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.2.mlp.experts.15.down_proj.weight", "model.layers.1.mlp.gate.weight",
     "model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.0.self_attn.q_a_layernorm.weight", "lm_head.weight"],
)  # fmt: skip
def test_a_build_without_one_tensor_or_with_a_wrong_one_is_refused_by_name(damaged: Path, name: str) -> None:
    config = load_model_config(damaged)
    file = _edit(damaged, name, lambda value: torch.cat([value, value]))
    with pytest.raises(CheckpointError, match=re.escape(f"{file}: {name} has shape")):
        _build(config, CheckpointWeights(damaged))
    _edit(damaged, name, lambda value: value.long())
    with pytest.raises(CheckpointError, match=re.escape(name)):
        _build(config, CheckpointWeights(damaged))
    _edit(damaged, name, lambda value: None)
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {name} is in none of its 2 files")):
        _build(config, CheckpointWeights(damaged))


@pytest.mark.parametrize("fp8_weights", [False, True])
def test_dummy_weights_build_what_a_checkpoint_builds(tiny: Tiny, fp8_weights: bool) -> None:
    folder = tiny("fp8", moe_intermediate_size=128, n_routed_experts=8, num_hidden_layers=2).folder
    config, options = load_model_config(folder), BuildOptions(max_positions=64, fp8_weights=fp8_weights)
    real, dummy = Listening(CheckpointWeights(folder)), Listening(DummyWeights())
    for source in (real, dummy):
        DeepseekV3Builder(config, source, ParallelContext(), KernelBackend(), options).build()
    assert dummy.asked == real.asked
    assert dummy.num_bytes == real.num_bytes


def test_an_unknown_dispatch_backend_and_experts_that_cut_blocks_are_refused(tiny: Tiny) -> None:
    config = load_model_config(tiny("plain").folder)
    with pytest.raises(ValueError, match="'pplx' is not built; choose one of none, torch, symm, deepep, deepep_v2"):
        _build(config, DummyWeights(), a2a_backend="pplx")
    options = BuildOptions(max_positions=64, fp8_weights=True)
    with pytest.raises(ValueError, match="this rank's part of an expert is 16 wide, wanted a multiple of 128"):
        DeepseekV3Builder(config, DummyWeights(), ParallelContext(moe_tp_size=2), KernelBackend(), options).build()


def test_an_fp8_matrix_that_no_backend_takes_and_one_that_is_not_fp8_are_refused_by_name(tiny: Tiny) -> None:
    for variant, backend, message in (
        (
            "fp8",
            "deep_gemm",
            r"q_a_proj.weight: no FP8 product: deep_gemm wants .* of multiples of 64 and 128, and a weight is \[48",
        ),
        ("plain", "torch", "q_a_proj.weight has dtype torch.float32, wanted torch.float8_e4m3fn with scales.* --quantization none"),
    ):
        folder = tiny(variant).folder
        options = BuildOptions(max_positions=64, fp8_weights=True, fp8_gemm_backends=(backend,))  # type: ignore[arg-type]
        with pytest.raises((ValueError, CheckpointError), match=message):
            DeepseekV3Builder(
                load_model_config(folder), CheckpointWeights(folder), ParallelContext(), KernelBackend(), options
            ).build()


LOADER = """
import sys
import torch
from moesaic.attention.backend import KernelBackend
from moesaic.launch.models.build import DeepseekV3Builder
from moesaic.launch.models.options import BuildOptions
from moesaic.launch.models.checkpoint_files import CheckpointError
from moesaic.launch.models.config import load_model_config
from moesaic.launch.models.parallel import ParallelContext
from moesaic.launch.models.weights import CheckpointWeights

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
torch.ones(8, 8) @ torch.ones(8, 8)
folder, ep_size = sys.argv[1], int(sys.argv[2])
baseline, given = status("VmRSS"), []
parallel = ParallelContext(world_size=ep_size, rank=ep_size - 1, ep_size=ep_size, ep_rank=ep_size - 1)
source = CheckpointWeights(folder, given.append)
options = BuildOptions(max_positions=64)
model = DeepseekV3Builder(load_model_config(folder), source, parallel, KernelBackend(), options).build()
print(sum(given), status("VmHWM") - baseline)
"""


@pytest.fixture
def big_checkpoint(tmp_path: Path) -> Iterator[Path]:
    """One sparse layer of 88 experts in bfloat16, 280 MB in two files; gone after the test."""
    changes = {"hidden_size": 1024, "moe_intermediate_size": 512, "n_routed_experts": 88, "num_hidden_layers": 1}
    raw = BASE | changes | {"first_k_dense_replace": 0, "architectures": ["DeepseekV3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    source = Listening(_Ones())
    _build(load_model_config(tmp_path), source)
    shapes = source._source.shapes  # type: ignore[attr-defined]
    for number, names in enumerate((list(shapes)[::2], list(shapes)[1::2])):
        tensors = {name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in names}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    yield tmp_path
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()


class _Ones:
    """Notes every tensor's whole shape."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, shard: Shard | None = None) -> Tensor:
        self.shapes[name] = shape
        return torch.zeros(1, dtype=dtype).expand(shape)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_loading_peaks_at_the_ranks_own_weights_and_half_a_gigabyte(big_checkpoint: Path) -> None:
    """As one of four expert ranks, in fp32: the others' experts (415 MB, and 210 MB of file) would not fit into the allowance."""
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(big_checkpoint), "4"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    own, peak = (int(number) for number in done.stdout.split())
    assert own > 138e6
    assert peak <= own + 512 * 2**20
