"""FP8 quantisation on a GPU: activations per 1x128 as they stream by, weights per 128x128 block, and back.

A block's values are multiplied with 448 / max, as DeepGEMM does it; the reference divides by max / 448. Where the two round to
different FP8 values, the values are neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.checks import FLOATS, check_tensor
from moesaic.kernels.quant import BLOCK, FP8, empty_scales
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two

ROWS, BLOCKS = 8, 4
"""Tile of a program over activations: 8 rows, 4 blocks of each."""


@triton.jit
def quantize_tile(values: tl.tensor, least: tl.constexpr) -> tl.tensor:
    """values fp32 [R, B, 128] -> (fp8 [R, B, 128], scales fp32 [R, B]); a block whose maximum is below `least` is scaled by it."""
    largest = tl.maximum(tl.max(tl.abs(values), axis=2), least)
    return (values * tl.expand_dims(448.0 / largest, 2)).to(tl.float8e4nv), tl.div_rn(largest, 448.0)


@triton.jit(do_not_specialize=["num_tokens", "scale_block_stride"])
def _per_token_kernel(
    x: tl.tensor,
    quantized: tl.tensor,
    scales: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_block_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    valid = (rows < num_tokens)[:, None, None] & (columns < width)[None, :, :]
    values = tl.load(x + rows[:, None, None] * x_stride + columns[None, :, :], mask=valid, other=0.0).to(tl.float32)
    tile, scale = quantize_tile(values, 1e-4)
    tl.store(quantized + rows[:, None, None] * width + columns[None, :, :], tile, mask=valid)
    places = rows[:, None] * scale_row_stride + blocks.to(tl.int64)[None, :] * scale_block_stride
    tl.store(scales + places, scale, mask=(rows < num_tokens)[:, None] & (blocks * 128 < width)[None, :])


def quantize_per_token(x: Tensor, *, mn_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """As `kernels.quant.quantize_per_token`."""
    check_tensor("quantize_per_token", "x", x, shape=(None, None), dtypes=FLOATS)
    num_tokens, width = x.shape
    quantized = x.new_empty(num_tokens, width, dtype=FP8)
    scales = empty_scales(x, mn_major=mn_major_scales)
    if x.numel():
        num_blocks = ceil_div(width, BLOCK)
        blocks = min(BLOCKS, power_of_two(num_blocks))
        launch(
            _per_token_kernel,
            (ceil_div(num_tokens, ROWS), ceil_div(num_blocks, blocks)),
            x=x,
            quantized=quantized,
            scales=scales,
            num_tokens=num_tokens,
            width=width,
            x_stride=x.stride(0),
            scale_row_stride=scales.stride(0),
            scale_block_stride=scales.stride(1),
            ROWS=ROWS,
            BLOCKS=blocks,
        )
    return quantized, scales


@triton.jit(do_not_specialize=["num_tokens"])
def _dequantize_rows_kernel(
    quantized: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_block_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    valid = (rows < num_tokens)[:, None, None] & (columns < width)[None, :, :]
    values = tl.load(quantized + rows[:, None, None] * stride + columns[None, :, :], mask=valid, other=0.0).to(tl.float32)
    places = rows[:, None] * scale_row_stride + blocks.to(tl.int64)[None, :] * scale_block_stride
    scale = tl.load(scales + places, mask=(rows < num_tokens)[:, None] & (blocks * 128 < width)[None, :], other=0.0)
    tl.store(
        out + rows[:, None, None] * width + columns[None, :, :],
        (values * tl.expand_dims(scale, 2)).to(out.dtype.element_ty),
        mask=valid,
    )


def dequantize_per_token(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As `kernels.quant.dequantize_per_token`."""
    num_tokens, width = quantized.shape
    num_blocks = ceil_div(width, BLOCK)
    check_tensor("dequantize_per_token", "quantized", quantized, shape=(None, None), dtypes=(FP8,))
    _check_scales("dequantize_per_token", scales, (num_tokens, num_blocks), quantized)
    out = quantized.new_empty(num_tokens, width, dtype=dtype)
    if quantized.numel():
        blocks = min(BLOCKS, power_of_two(num_blocks))
        launch(
            _dequantize_rows_kernel,
            (ceil_div(num_tokens, ROWS), ceil_div(num_blocks, blocks)),
            quantized=quantized,
            scales=scales,
            out=out,
            num_tokens=num_tokens,
            width=width,
            stride=quantized.stride(0),
            scale_row_stride=scales.stride(0),
            scale_block_stride=scales.stride(1),
            ROWS=ROWS,
            BLOCKS=blocks,
        )
    return out


def _check_scales(function: str, scales: Tensor, shape: tuple[int, int], like: Tensor) -> None:
    """Scales may lie either way round, so their strides are free."""
    if tuple(scales.shape) != shape or scales.dtype is not torch.float32 or scales.device != like.device:
        got = f"{scales.dtype} {list(scales.shape)} on {scales.device}"
        raise ValueError(f"{function}: scales is {got}, wanted torch.float32 {list(shape)} on {like.device}")


@triton.jit
def _quantize_blocks_kernel(
    weight: tl.tensor,
    quantized: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    stride: tl.tensor,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    valid = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    values = tl.load(weight + rows[:, None] * stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.max(tl.abs(values), axis=1), axis=0), 1e-12)
    tile = (values * (448.0 / largest)).to(tl.float8e4nv)
    tl.store(quantized + rows[:, None] * num_columns + columns[None, :], tile, mask=valid)
    tl.store(scales + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.div_rn(largest, 448.0))


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.quant.quantize_blocks`."""
    check_tensor("quantize_blocks", "weight", weight, shape=(None, None), dtypes=FLOATS)
    rows, columns = weight.shape
    grid = (ceil_div(rows, BLOCK), ceil_div(columns, BLOCK))
    quantized, scales = weight.new_empty(rows, columns, dtype=FP8), weight.new_empty(grid, dtype=torch.float32)
    launch(
        _quantize_blocks_kernel,
        grid,
        weight=weight,
        quantized=quantized,
        scales=scales,
        num_rows=rows,
        num_columns=columns,
        stride=weight.stride(0),
        num_warps=8,
    )
    return quantized, scales


@triton.jit
def _dequantize_blocks_kernel(
    quantized: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    stride: tl.tensor,
    scale_stride: tl.tensor,
    row_offset: tl.tensor,
    column_offset: tl.tensor,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * 128 - row_offset + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 - column_offset + tl.arange(0, 128)
    valid = ((rows >= 0) & (rows < num_rows))[:, None] & ((columns >= 0) & (columns < num_columns))[None, :]
    values = tl.load(quantized + rows[:, None] * stride + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    scale = tl.load(scales + tl.program_id(0) * scale_stride + tl.program_id(1))
    tl.store(out + rows[:, None] * num_columns + columns[None, :], (values * scale).to(out.dtype.element_ty), mask=valid)


def dequantize_blocks(
    quantized: Tensor, scales: Tensor, dtype: torch.dtype, *, row_offset: int = 0, column_offset: int = 0
) -> Tensor:
    """As `kernels.quant.dequantize_blocks`; one program per block of the scales."""
    rows, columns = quantized.shape
    check_tensor("dequantize_blocks", "quantized", quantized, shape=(None, None), dtypes=(FP8,))
    grid = (ceil_div(row_offset + rows, BLOCK), ceil_div(column_offset + columns, BLOCK))
    check_tensor("dequantize_blocks", "scales", scales, shape=grid, dtypes=(torch.float32,), like=quantized)
    out = quantized.new_empty(rows, columns, dtype=dtype)
    if out.numel():
        launch(
            _dequantize_blocks_kernel,
            grid,
            quantized=quantized,
            scales=scales,
            out=out,
            num_rows=rows,
            num_columns=columns,
            stride=quantized.stride(0),
            scale_stride=scales.stride(0),
            row_offset=row_offset,
            column_offset=column_offset,
            num_warps=8,
        )
    return out
