"""Dense product of FP8 rows and an FP8 weight in 128x128 blocks (DeepSeek-V3 report, section 3.3.2), accumulated in fp32.

Knows the backends by name (kernels/grouped_backends.py), takes the table's choice by the number of rows, and says which of them
take a weight's shape.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from moesaic.kernels.checks import check_tensor
from moesaic.kernels.gpu import uses_triton
from moesaic.kernels.grouped_backends import BACKENDS, Name, choose
from moesaic.kernels.quant import BLOCK, FP8, dequantize_blocks_reference, dequantize_per_token_reference


class DenseProduct(Protocol):
    """What the module of a backend with dense products has; as the front function, less `backend`."""

    def fp8_gemm(self, x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, *, out_dtype: torch.dtype) -> Tensor: ...


def fp8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backends: Sequence[Name] | Literal["auto"] = "auto",
) -> Tensor:
    """x [M, K] times weight [N, K] -> [M, N] of out_dtype.

    x e4m3 with fp32 scales [M, ceil(K / 128)], in either layout of `quant.quantize_per_token`; weight e4m3 with fp32 scales
    [ceil(N / 128), ceil(K / 128)]. Of several backends the table chooses; "auto" is Triton for CUDA tensors and torch for others.
    Raises ValueError.
    """
    _check(x, x_scales, weight, weight_scales)
    candidates = backends if backends != "auto" else ("triton",) if uses_triton(x) else ("torch",)
    module = BACKENDS[choose("fp8", "dense", len(x), candidates)].module
    if module is None:
        return fp8_gemm_reference(x, x_scales, weight, weight_scales, out_dtype=out_dtype)
    product: DenseProduct = importlib.import_module(module)
    return product.fp8_gemm(x, x_scales, weight, weight_scales, out_dtype=out_dtype)


def fp8_gemm_reference(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The same in torch, any device: both sides dequantised to fp32, at every call."""
    rows = dequantize_per_token_reference(x, x_scales, torch.float32)
    return (rows @ dequantize_blocks_reference(weight, weight_scales, torch.float32).t()).to(out_dtype)


def _check(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> None:
    function = "fp8_gemm"
    check_tensor(function, "x", x, shape=(None, None), dtypes=(FP8,), contiguous=True)
    check_tensor(function, "weight", weight, shape=(None, x.shape[1]), dtypes=(FP8,), like=x, contiguous=True)
    width_blocks, depth_blocks = (-(-size // BLOCK) for size in weight.shape)
    wanted = (len(x), depth_blocks)
    if tuple(x_scales.shape) != wanted or x_scales.dtype is not torch.float32 or x_scales.device != x.device:
        got = f"{x_scales.dtype} {list(x_scales.shape)} on {x_scales.device}"
        raise ValueError(f"{function}: x_scales is {got}, wanted torch.float32 {list(wanted)} on {x.device}")
    shape = (width_blocks, depth_blocks)
    check_tensor(function, "weight_scales", weight_scales, shape=shape, dtypes=(torch.float32,), like=x, contiguous=True)
