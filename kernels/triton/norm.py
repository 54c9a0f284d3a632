"""RMS normalisation on a GPU, a row per program: with residual addition before and FP8 quantisation after, or without."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.checks import FLOATS, check_tensor
from moesaic.kernels.quant import BLOCK, FP8, empty_scales
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two
from moesaic.kernels.triton.quant import quantize_tile

WIDEST_BLOCKS = 128
"""A row is one tile: at most 128 blocks of 128 elements."""


@triton.jit(do_not_specialize=["scale_block_stride"])
def _rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    scales: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_block_stride: tl.tensor,
    eps: tl.tensor,
    BLOCKS: tl.constexpr,
    ADDS: tl.constexpr,
    QUANTIZES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    valid = columns < width
    values = tl.load(x + row * x_stride + columns, mask=valid, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(residual + row * residual_stride + columns, mask=valid, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * width + columns, rounded, mask=valid)
        values = rounded.to(tl.float32)
    mean = tl.sum(tl.sum(values * values, axis=1), axis=0) / width
    normed = values * tl.rsqrt(mean + eps) * tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)
    if QUANTIZES:
        tile, scale = quantize_tile(tl.expand_dims(normed, 0), 1e-4)
        tl.store(out + row * width + tl.expand_dims(columns, 0), tile, mask=tl.expand_dims(valid, 0))
        places = row * scale_row_stride + blocks.to(tl.int64)[None, :] * scale_block_stride
        tl.store(scales + places, scale, mask=(blocks * 128 < width)[None, :])
    else:
        tl.store(out + row * width + columns, normed.to(out.dtype.element_ty), mask=valid)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `kernels.norm.rms_norm`."""
    _check("rms_norm", x, None, weight)
    out = x.new_empty(x.shape)
    _launch(x, None, weight, eps, out=out, total=None, scales=None)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `kernels.norm.add_rms_norm`."""
    _check("add_rms_norm", x, residual, weight)
    out, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(x, residual, weight, eps, out=out, total=total, scales=None)
    return out, total


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, *, mn_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """As `kernels.norm.rms_norm_quantize`."""
    _check("rms_norm_quantize", x, None, weight)
    out, scales = x.new_empty(x.shape, dtype=FP8), empty_scales(x, mn_major=mn_major_scales)
    _launch(x, None, weight, eps, out=out, total=None, scales=scales)
    return out, scales


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, mn_major_scales: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.norm.add_rms_norm_quantize`."""
    _check("add_rms_norm_quantize", x, residual, weight)
    out, total = x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape)
    scales = empty_scales(x, mn_major=mn_major_scales)
    _launch(x, residual, weight, eps, out=out, total=total, scales=scales)
    return out, scales, total


def _check(function: str, x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    check_tensor(function, "x", x, shape=(None, None), dtypes=FLOATS)
    check_tensor(function, "weight", weight, shape=x.shape[1:], dtypes=FLOATS, like=x)
    if residual is not None:
        check_tensor(function, "residual", residual, shape=x.shape, dtypes=(x.dtype,), like=x)
    if x.shape[1] > WIDEST_BLOCKS * BLOCK:
        raise ValueError(f"{function}: x has {x.shape[1]} columns, wanted at most {WIDEST_BLOCKS * BLOCK}")


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, out: Tensor, total: Tensor | None, scales: Tensor | None
) -> None:
    if not x.numel():
        return
    num_tokens, width = x.shape
    blocks = power_of_two(ceil_div(width, BLOCK))
    launch(
        _rms_norm_kernel,
        (num_tokens,),
        x=x,
        residual=residual,
        weight=weight,
        out=out,
        total=total,
        scales=scales,
        width=width,
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        scale_row_stride=0 if scales is None else scales.stride(0),
        scale_block_stride=0 if scales is None else scales.stride(1),
        eps=eps,
        BLOCKS=blocks,
        ADDS=residual is not None,
        QUANTIZES=scales is not None,
        num_warps=8 if blocks >= 32 else 4,
    )
