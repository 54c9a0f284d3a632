"""Grouped matrix product: each expert's rows times that expert's weight, for the contiguous and the masked layout.

On CPU the work is bound by reading weights, so what counts is to read each active expert's weight once and to make few calls:
one batched product when most experts have rows, one product per active expert when few have.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_gemm_contiguous(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """x [sum(counts), K], rows sorted by expert; weight [E, N, K]; counts rows per expert -> [sum(counts), N].

    Raises ValueError when counts don't match the shapes.
    """
    if len(counts) != weight.shape[0] or sum(counts) != x.shape[0]:
        raise ValueError(
            f"grouped_gemm_contiguous: {len(counts)} counts with sum {sum(counts)} don't fit "
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            torch.mm(x[start : start + count], weight[expert].t(), out=out[start : start + count])
            start += count
    return out


def grouped_gemm_masked(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [E, M, K] with counts int64 [E] valid rows per expert; weight [E, N, K] -> [E, M, N], invalid rows unspecified."""
    return torch.bmm(x, weight.transpose(1, 2))
