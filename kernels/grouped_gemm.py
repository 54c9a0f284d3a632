"""Grouped matrix product: each expert's rows times that expert's weight, for the contiguous and the masked layout.

On CPU the work is bound by reading weights, so what counts is to read each active expert's weight once and to make few calls:
one batched product when most experts have rows, one product per active expert when few have.
"""

from __future__ import annotations

import ctypes
from array import array

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels.native.library import kernels_for

MAX_BATCHED_ROWS = 32


def grouped_gemm_contiguous(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """x [sum(counts), K], rows sorted by expert; weight [E, N, K]; counts rows per expert -> [sum(counts), N].

    Raises ValueError when counts don't match the shapes.
    """
    if len(counts) != weight.shape[0] or sum(counts) != x.shape[0]:
        raise ValueError(
            f"grouped_gemm_contiguous: {len(counts)} counts with sum {sum(counts)} don't fit "
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    native = kernels_for(x)
    if native is not None and x.is_contiguous() and _out_fastest(weight):
        return _native(native, x, weight, counts)
    if _prefers_batch(counts):
        return _batched(x, weight, counts)
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for expert in np.flatnonzero(counts).tolist():
        stop = start + counts[expert]
        torch.mm(x[start:stop], weight[expert].t(), out=out[start:stop])
        start = stop
    return out


def _out_fastest(weight: Tensor) -> bool:
    """Whether the memory is [E, K, N], as the model's builder lays expert weights out."""
    return weight.transpose(1, 2).is_contiguous()


def _native(native: ctypes.CDLL, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    num_experts, width, depth = weight.shape
    out = x.new_empty(x.shape[0], width)
    given, room = array("q", counts), torch.empty(2 * num_experts, dtype=torch.int64)
    native.grouped_gemm(
        x.data_ptr(),
        weight.data_ptr(),
        given.buffer_info()[0],
        num_experts,
        depth,
        width,
        out.data_ptr(),
        room.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _prefers_batch(counts: list[int]) -> bool:
    """Whether padding all experts to the longest costs less than one call each: most have rows, none has many."""
    return max(counts, default=0) <= MAX_BATCHED_ROWS and 2 * (len(counts) - counts.count(0)) > len(counts)


def _batched(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    longest = max(counts)
    valid = torch.arange(longest) < torch.tensor(counts).unsqueeze(1)
    rows = valid.flatten().nonzero().squeeze(1).to(x.device)
    padded = x.new_zeros(len(counts) * longest, x.shape[1]).index_copy_(0, rows, x)
    product = torch.bmm(padded.view(len(counts), longest, -1), weight.transpose(1, 2))
    return product.view(-1, weight.shape[1]).index_select(0, rows)


def grouped_gemm_masked(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [E, M, K] with counts int64 [E] valid rows per expert; weight [E, N, K] -> [E, M, N], invalid rows unspecified."""
    return torch.bmm(x, weight.transpose(1, 2))
