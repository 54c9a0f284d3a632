"""Dense matrix product with a weight in the checkpoint's [out, in] order, in the model's dtype or in FP8.

A weight in FP8 is computed with in FP8, and rows for it may come in FP8 already (kernels/fp8_rows.py); a plain weight can simulate
that: `fp8_activations`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.fp8_gemm import fp8_gemm
from moesaic.kernels.fp8_rows import Fp8Rows, quantized_rows
from moesaic.kernels.grouped_backends import Name
from moesaic.kernels.quant import BLOCK, round_to_fp8


@dataclass(frozen=True, kw_only=True)
class BlockWeight:
    """A weight [N, K] as FP8 checkpoints hold it: values e4m3 [N, K], scales fp32 [ceil(N / 128), ceil(K / 128)].

    `backends`: of its products, those that take its shape; (): Triton on CUDA, torch elsewhere.
    """

    values: Tensor
    scales: Tensor
    backends: tuple[Name, ...] = ()


Matrix = Tensor | BlockWeight | tuple[BlockWeight, ...]
"""A weight [N, K]: in the model's dtype, in FP8, or in FP8 as several whose rows follow one another (`stacked`)."""
Rows = Tensor | Fp8Rows
"""What a weight is multiplied with: [..., K], or [T, K] in FP8 for weights in FP8."""


def is_fp8(weight: Matrix) -> bool:
    """Whether rows for this weight are best quantised by the operation that makes them."""
    return not isinstance(weight, Tensor)


def stacked(*weights: BlockWeight) -> Matrix:
    """Weights [N_i, K] as one of all their rows: one tensor, unless a later one would begin inside a block of an earlier one."""
    if any(each.values.shape[0] % BLOCK for each in weights[:-1]):
        return weights
    values, scales = (torch.cat(parts) for parts in zip(*((each.values, each.scales) for each in weights), strict=True))
    backends = tuple(name for name in weights[0].backends if all(name in each.backends for each in weights))
    return BlockWeight(values=values, scales=scales, backends=backends)


def linear(x: Rows, weight: Matrix, *, fp8_activations: bool = False) -> Tensor:
    """x [..., K] times weight [N, K] -> [..., N] in x's dtype.

    With `fp8_activations` the weight holds dequantised FP8 blocks and x is rounded to FP8 per 1x128 first: what a W8A8 GEMM with
    fp32 accumulation computes, up to the order of its sums. A weight in FP8 is such a GEMM whatever `fp8_activations` says; no
    value leaves the device for it. Raises ValueError for a weight in FP8 that does not fit.
    """
    if isinstance(weight, Tensor):
        assert isinstance(x, Tensor), "FP8 rows need a weight in FP8"
        return torch.nn.functional.linear(round_to_fp8(x) if fp8_activations else x, weight)
    rows = x if isinstance(x, Fp8Rows) else quantized_rows(x.reshape(-1, x.shape[-1]))
    parts = (weight,) if isinstance(weight, BlockWeight) else weight
    products = [_product(rows, part) for part in parts]
    out = products[0] if len(products) == 1 else torch.cat(products, dim=1)
    return out if isinstance(x, Fp8Rows) else out.view(*x.shape[:-1], out.shape[1])


def _product(rows: Fp8Rows, weight: BlockWeight) -> Tensor:
    return fp8_gemm(
        rows.values, rows.scales, weight.values, weight.scales, out_dtype=rows.dtype, backends=weight.backends or "auto"
    )
