"""Rows in FP8 as a product takes them: quantised alone, or by the operation that makes them (RMSNorm, SwiGLU), in one kernel.

Scales lie with the rows running fastest in memory, as DeepGEMM wants them and the others take them too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.activation import swiglu_quantize
from moesaic.kernels.norm import add_rms_norm_quantize, rms_norm_quantize
from moesaic.kernels.quant import quantize_per_token


@dataclass(frozen=True, kw_only=True)
class Fp8Rows:
    """values e4m3 [T, K], scales fp32 [T, ceil(K / 128)], and the dtype of what products with them give."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


def quantized_rows(x: Tensor) -> Fp8Rows:
    """x [T, K], per 1x128."""
    values, scales = quantize_per_token(x, mn_major_scales=True)
    return Fp8Rows(values=values, scales=scales, dtype=x.dtype)


def normed_rows(x: Tensor, weight: Tensor, eps: float) -> Fp8Rows:
    """norm(x) of x [T, H] times weight [H], rounded once, from fp32."""
    values, scales = rms_norm_quantize(x, weight, eps, mn_major_scales=True)
    return Fp8Rows(values=values, scales=scales, dtype=x.dtype)


def add_normed_rows(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Fp8Rows, Tensor]:
    """`normed_rows` of x + residual, and the sum itself in x's dtype [T, H]."""
    values, scales, total = add_rms_norm_quantize(x, residual, weight, eps, mn_major_scales=True)
    return Fp8Rows(values=values, scales=scales, dtype=x.dtype), total


def swiglu_rows(gate_up: Tensor) -> Fp8Rows:
    """silu(gate) * up of gate_up [T, 2 * I], gate first -> rows of width I, rounded once, from fp32."""
    values, scales = swiglu_quantize(gate_up, mn_major_scales=True)
    return Fp8Rows(values=values, scales=scales, dtype=gate_up.dtype)
