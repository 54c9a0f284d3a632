"""Dense matrix product with a weight in the checkpoint's [out, in] order, in the model's dtype or as the FP8 GEMM computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.quant import round_to_fp8


def linear(x: Tensor, weight: Tensor, *, fp8_activations: bool = False) -> Tensor:
    """x [..., K] times weight [N, K] -> [..., N].

    With `fp8_activations` the weight holds dequantised FP8 blocks and x is rounded to FP8 per 1x128 first: what a W8A8 GEMM with
    fp32 accumulation computes, up to the order of its sums.
    """
    if fp8_activations:
        x = round_to_fp8(x)
    return torch.nn.functional.linear(x, weight)
