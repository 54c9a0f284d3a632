"""Grouped matrix product: each expert's rows times that expert's weight, for the contiguous and the masked layout.

`backend` names an implementation (kernels/grouped_backends.py); "auto" is Triton for CUDA tensors and torch, or C, for others.
On CPU the work is bound by reading weights, so what counts is to read each active expert's weight once and to make few calls:
one batched product when most experts have rows, one product per active expert when few have.
"""

from __future__ import annotations

import ctypes
import importlib
from array import array
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels.checks import INDICES, check_tensor
from moesaic.kernels.gpu import uses_triton
from moesaic.kernels.grouped_backends import BACKENDS, Name
from moesaic.kernels.native.library import kernels_for
from moesaic.kernels.quant import BLOCK, FP8, dequantize_blocks_reference, dequantize_per_token_reference

MAX_BATCHED_ROWS = 32
Choice = Name | Literal["auto"]


class GroupedProducts(Protocol):
    """What a backend's module has; each as the front function of its name, less `backend`."""

    def grouped_gemm_contiguous(self, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor: ...

    def grouped_gemm_masked(self, x: Tensor, weight: Tensor, counts: Tensor, *, expected_rows: int | None = None) -> Tensor: ...

    def grouped_gemm_fp8_contiguous(
        self, x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, counts: list[int], *, out_dtype: torch.dtype
    ) -> Tensor: ...

    def grouped_gemm_fp8_masked(
        self,
        x: Tensor,
        x_scales: Tensor,
        weight: Tensor,
        weight_scales: Tensor,
        counts: Tensor,
        *,
        expected_rows: int | None = None,
        out_dtype: torch.dtype,
    ) -> Tensor: ...


def _device_products(x: Tensor, backend: Choice) -> GroupedProducts | None:
    """The backend's module; None where torch computes."""
    name = backend if backend != "auto" else "triton" if uses_triton(x) else "torch"
    module = BACKENDS[name].module
    products: GroupedProducts | None = None if module is None else importlib.import_module(module)
    return products


def grouped_gemm_contiguous(x: Tensor, weight: Tensor, counts: list[int], *, backend: Choice = "auto") -> Tensor:
    """x [sum(counts), K], rows sorted by expert; weight [E, N, K]; counts rows per expert -> [sum(counts), N].

    Raises ValueError when counts don't match the shapes.
    """
    if len(counts) != weight.shape[0] or sum(counts) != x.shape[0]:
        raise ValueError(
            f"grouped_gemm_contiguous: {len(counts)} counts with sum {sum(counts)} don't fit "
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    device = _device_products(x, backend)
    if device is not None:
        return device.grouped_gemm_contiguous(x, weight, counts)
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


def grouped_gemm_masked(
    x: Tensor, weight: Tensor, counts: Tensor, *, expected_rows: int | None = None, backend: Choice = "auto"
) -> Tensor:
    """x [E, M, K] with counts int64 [E] valid rows per expert; weight [E, N, K] -> [E, M, N], invalid rows unspecified.

    `expected_rows` per expert, by default M, let a device choose its tiles; they change no result. Raises ValueError on a device.
    """
    device = _device_products(x, backend)
    if device is not None:
        return device.grouped_gemm_masked(x, weight, counts, expected_rows=expected_rows)
    return torch.bmm(x, weight.transpose(1, 2))


def grouped_gemm_fp8_contiguous(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Choice = "auto",
) -> Tensor:
    """`grouped_gemm_contiguous` of FP8 rows and FP8 weights, accumulated in fp32 -> [sum(counts), N] of out_dtype.

    x e4m3 [M, K] with fp32 scales [M, ceil(K / 128)], in either layout of `quant.quantize_per_token`; weight e4m3 [E, N, K] with
    fp32 scales [E, ceil(N / 128), ceil(K / 128)]. Raises ValueError.
    """
    _check_fp8("grouped_gemm_fp8_contiguous", x, x_scales, weight, weight_scales, rank=2)
    if len(counts) != weight.shape[0] or sum(counts) != x.shape[0]:
        raise ValueError(
            f"grouped_gemm_fp8_contiguous: {len(counts)} counts with sum {sum(counts)} don't fit "
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    device = _device_products(x, backend)
    if device is not None:
        return device.grouped_gemm_fp8_contiguous(x, x_scales, weight, weight_scales, counts, out_dtype=out_dtype)
    return grouped_gemm_fp8_contiguous_reference(x, x_scales, weight, weight_scales, counts, out_dtype=out_dtype)


def grouped_gemm_fp8_contiguous_reference(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The same in torch, any device: dequantised to fp32."""
    rows = dequantize_per_token_reference(x, x_scales, torch.float32)
    products = [
        part @ dequantize_blocks_reference(weight[expert], weight_scales[expert], torch.float32).t()
        for expert, part in enumerate(torch.split(rows, counts))
    ]
    return torch.cat(products).to(out_dtype)


def grouped_gemm_fp8_masked(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: Tensor,
    *,
    expected_rows: int | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Choice = "auto",
) -> Tensor:
    """`grouped_gemm_masked` of FP8 rows [E, M, K] and FP8 weights; scales as in `grouped_gemm_fp8_contiguous`, per expert."""
    _check_fp8("grouped_gemm_fp8_masked", x, x_scales, weight, weight_scales, rank=3)
    check_tensor("grouped_gemm_fp8_masked", "counts", counts, shape=x.shape[:1], dtypes=INDICES, like=x)
    device = _device_products(x, backend)
    if device is not None:
        return device.grouped_gemm_fp8_masked(
            x, x_scales, weight, weight_scales, counts, expected_rows=expected_rows, out_dtype=out_dtype
        )
    num_experts, room, depth = x.shape
    scales = x_scales.reshape(num_experts * room, x_scales.shape[2])
    rows = grouped_gemm_fp8_contiguous_reference(
        x.reshape(num_experts * room, depth), scales, weight, weight_scales, [room] * num_experts, out_dtype=out_dtype
    )
    return rows.view(num_experts, room, weight.shape[1])


def _check_fp8(function: str, x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, *, rank: int) -> None:
    check_tensor(function, "x", x, shape=(None,) * rank, dtypes=(FP8,), contiguous=True)
    num_experts = x.shape[0] if rank == 3 else None
    check_tensor(function, "weight", weight, shape=(num_experts, None, x.shape[-1]), dtypes=(FP8,), like=x, contiguous=True)
    depth_blocks, width_blocks = -(-x.shape[-1] // BLOCK), -(-weight.shape[1] // BLOCK)
    wanted = (*x.shape[:-1], depth_blocks)
    if tuple(x_scales.shape) != wanted or x_scales.dtype is not torch.float32 or x_scales.device != x.device:
        got = f"{x_scales.dtype} {list(x_scales.shape)} on {x_scales.device}"
        raise ValueError(f"{function}: x_scales is {got}, wanted torch.float32 {list(wanted)} on {x.device}")
    shape = (weight.shape[0], width_blocks, depth_blocks)
    check_tensor(function, "weight_scales", weight_scales, shape=shape, dtypes=(torch.float32,), like=x, contiguous=True)
