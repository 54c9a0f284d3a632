"""Dense matrix product with a weight in the checkpoint's [out, in] order, in the model's dtype or as the FP8 GEMM computes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.grouped_gemm import grouped_gemm_fp8_masked
from moesaic.kernels.quant import quantize_per_token, round_to_fp8


@dataclass(frozen=True, kw_only=True)
class BlockWeight:
    """A weight [N, K] as FP8 checkpoints hold it: values e4m3 [N, K], scales fp32 [ceil(N / 128), ceil(K / 128)]."""

    values: Tensor
    scales: Tensor


Matrix = Tensor | BlockWeight
"""A weight [N, K], in the model's dtype or in FP8."""


def linear(x: Tensor, weight: Matrix, *, fp8_activations: bool = False) -> Tensor:
    """x [..., K] times weight [N, K] -> [..., N] in x's dtype.

    With `fp8_activations` the weight holds dequantised FP8 blocks and x is rounded to FP8 per 1x128 first: what a W8A8 GEMM with
    fp32 accumulation computes, up to the order of its sums. A `BlockWeight` is such a GEMM whatever `fp8_activations` says; no
    value leaves the device for it. Raises ValueError for a `BlockWeight` that does not fit.
    """
    if isinstance(weight, BlockWeight):
        return _fp8_product(x, weight)
    if fp8_activations:
        x = round_to_fp8(x)
    return torch.nn.functional.linear(x, weight)


def _fp8_product(x: Tensor, weight: BlockWeight) -> Tensor:
    """The grouped product of one group, in the masked form: its count can be on the device."""
    rows = x.reshape(-1, x.shape[-1])
    values, scales = quantize_per_token(rows)
    count = torch.full((1,), len(rows), dtype=torch.int64, device=x.device)
    out = grouped_gemm_fp8_masked(
        values.contiguous().unsqueeze(0),
        scales.unsqueeze(0),
        weight.values.unsqueeze(0),
        weight.scales.unsqueeze(0),
        count,
        out_dtype=x.dtype,
    )
    return out.view(*x.shape[:-1], out.shape[-1])
