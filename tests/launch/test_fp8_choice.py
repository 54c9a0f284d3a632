"""The released models and the demo compute in FP8 on a GPU, by kernels that take every one of their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepseek_v3 import DEEPSEEK_V3

from moesaic.attention.backend import KernelBackend
from moesaic.kernels.gemm import BlockWeight
from moesaic.kernels.grouped_backends import dense_unfit_reason
from moesaic.launch.config import ServerConfig
from moesaic.launch.demo import CHECKPOINT_DIR
from moesaic.launch.hardware import Hardware
from moesaic.launch.memory_parts import MemoryInputs, weight_bytes
from moesaic.launch.models.build import DeepseekV3Builder
from moesaic.launch.models.config import ModelConfig, load_model_config, parse_model_config
from moesaic.launch.models.options import BuildOptions
from moesaic.launch.models.parallel import ParallelContext
from moesaic.launch.models.tensors import FP8_KINDS, tensors_without_experts
from moesaic.launch.models.weights import CheckpointWeights
from moesaic.launch.resolution import Resolution, resolve
from moesaic.launch.startup import model_shape

KIMI_K2: dict[str, Any] = DEEPSEEK_V3 | {"n_routed_experts": 384, "num_attention_heads": 64, "n_group": 1, "topk_group": 1}
GPU_BOX = Hardware(num_cores=64, num_cuda_devices=8)
SHARED_BY_8: dict[str, Any] = {"tp_size": 8, "ep_size": 8}
ALONE_OF_8: dict[str, Any] = {"tp_size": 8, "dp_size": 8, "enable_dp_attention": True, "moe_a2a_backend": "torch"}


def _settle(model: ModelConfig, **flags: Any) -> Resolution:
    return resolve(ServerConfig(model_path="m", **flags), model_shape(model), GPU_BOX)


def _dense_shapes(model: ModelConfig, resolution: Resolution) -> Iterator[tuple[int, int]]:
    """[out, in] of a rank's part of every matrix that a dense FP8 product reads."""
    topology = resolution.topology
    scatters = resolution.config.moe_a2a_backend != "none"
    parts = {"whole": 1, "attention": topology.attn_tp_size, "dense": topology.moe_dense_tp_size}
    parts["shared"] = 1 if scatters else topology.attn_tp_size
    for spec in tensors_without_experts(model):
        if spec.blocks and not spec.absorbed:
            width, depth = spec.part(parts[spec.cut])
            yield width, depth


@pytest.mark.parametrize("raw", [DEEPSEEK_V3, KIMI_K2], ids=["DeepSeek-V3", "Kimi-K2"])
@pytest.mark.parametrize("flags", [{}, SHARED_BY_8, ALONE_OF_8])
def test_deep_gemm_and_triton_take_every_matrix_of_the_released_models(raw: dict[str, Any], flags: dict[str, Any]) -> None:
    model = parse_model_config(raw)
    resolution = _settle(model, **flags)
    assert resolution.config.fp8_weights and resolution.config.fp8_gemm_backends == ("deep_gemm", "triton")
    shapes = set(_dense_shapes(model, resolution))
    assert (1536, 7168) in shapes and (576, 7168) in shapes
    assert not [shape for shape in shapes if dense_unfit_reason("deep_gemm", *shape) or dense_unfit_reason("triton", *shape)]


def test_the_demo_model_is_held_in_fp8_as_planned() -> None:
    """Its experts are 64 wide: they are filled up to a block."""
    model = load_model_config(CHECKPOINT_DIR)
    resolution = _settle(model)
    assert resolution.config.fp8_weights
    options = BuildOptions(dtype=torch.bfloat16, max_positions=64, fp8_weights=True, fp8_gemm_backends=("deep_gemm", "triton"))
    built = DeepseekV3Builder(model, CheckpointWeights(CHECKPOINT_DIR), ParallelContext(), KernelBackend(), options).build()
    inputs = MemoryInputs(
        model=model,
        topology=resolution.topology,
        config=resolution.config,
        num_slots=model.n_routed_experts,
        fp8=FP8_KINDS,
    )
    held = sum(tensor.nbytes for experts in built.experts for tensor in experts.tensors)
    assert held == weight_bytes(inputs)["routed experts"]
    down = built._layers[0].parts.attention._weights.down
    assert isinstance(down, BlockWeight) and down.values.shape == (128 + 128 + 32, 256)
    assert down.backends == ("triton",), "DeepGEMM takes no weight of 160 rows, kv_a_proj"
