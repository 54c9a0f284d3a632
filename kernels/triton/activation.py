"""SwiGLU on a GPU: alone, and fused with the FP8 quantisation of the second expert product's input.

The fused kernel reads gate and up once and writes FP8 values and scales; what lies between is fp32, never rounded to the input's
dtype. Padding rows are neither read nor written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.activation import check_fused, check_fused_masked
from moesaic.kernels.checks import FLOATS
from moesaic.kernels.quant import BLOCK, FP8, empty_scales
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two
from moesaic.kernels.triton.quant import quantize_tile

TILE = 1024
ROWS, BLOCKS = 4, 4
"""Tile of the fused kernel: 4 rows, 4 blocks of each."""
MOST_ROW_PROGRAMS = 32
"""Programs that share the rows of one expert in the masked layout; each goes on until the expert's last valid row."""


@triton.jit
def _silu_times(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _swiglu_kernel(gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, TILE: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate = tl.load(gate_up + row * 2 * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, _silu_times(gate, up).to(out.dtype.element_ty), mask=columns < width)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `kernels.activation.swiglu`. Raises ValueError."""
    if gate_up.dtype not in FLOATS or gate_up.shape[-1] % 2 or not gate_up.is_contiguous():
        got = f"{gate_up.dtype} {list(gate_up.shape)} with strides {list(gate_up.stride())}"
        raise ValueError(f"swiglu: gate_up is {got}, wanted contiguous floats, gate and up side by side")
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if out.numel():
        num_rows = out.numel() // width
        tile = min(TILE, power_of_two(width))
        grid = (num_rows, ceil_div(width, tile))
        launch(_swiglu_kernel, grid, gate_up=gate_up, out=out, width=width, TILE=tile)
    return out


@triton.jit(do_not_specialize=["num_rows", "scale_expert_stride", "scale_block_stride"])
def _swiglu_quantize_kernel(
    gate_up: tl.tensor,
    quantized: tl.tensor,
    scales: tl.tensor,
    rows_of: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    scale_expert_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_block_stride: tl.tensor,
    MASKED: tl.constexpr,
    SKIPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    expert = tl.program_id(2).to(tl.int64)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    count = tl.load(rows_of + expert).to(tl.int32) if MASKED else num_rows
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        valid_rows = rows < count
        if SKIPS:
            valid_rows = valid_rows & (tl.load(rows_of + rows, mask=valid_rows, other=-1) >= 0)
        places = (expert * num_rows + rows)[:, None, None]
        valid = valid_rows[:, None, None] & (columns < width)[None, :, :]
        at = gate_up + places * 2 * width + columns[None, :, :]
        gate = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        up = tl.load(at + width, mask=valid, other=0.0).to(tl.float32)
        tile, scale = quantize_tile(_silu_times(gate, up), 1e-4)
        tl.store(quantized + places * width + columns[None, :, :], tile, mask=valid)
        scale_places = rows.to(tl.int64)[:, None] * scale_row_stride + blocks.to(tl.int64)[None, :] * scale_block_stride
        inside = valid_rows[:, None] & (blocks * 128 < width)[None, :]
        tl.store(scales + expert * scale_expert_stride + scale_places, scale, mask=inside)


def swiglu_quantize(gate_up: Tensor, *, row_expert: Tensor | None = None, mn_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """As `kernels.activation.swiglu_quantize`."""
    check_fused(gate_up, row_expert)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    quantized = gate_up.new_empty(num_rows, width, dtype=FP8)
    scales = empty_scales(quantized, mn_major=mn_major_scales)
    if quantized.numel():
        _launch(gate_up, quantized, scales, row_expert, num_rows, masked=False)
    return quantized, scales


def swiglu_quantize_masked(gate_up: Tensor, counts: Tensor, *, mn_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """As `kernels.activation.swiglu_quantize_masked`."""
    check_fused_masked(gate_up, counts)
    num_experts, num_rows, width = gate_up.shape[0], gate_up.shape[1], gate_up.shape[2] // 2
    quantized = gate_up.new_empty(num_experts, num_rows, width, dtype=FP8)
    scales = empty_scales(quantized, mn_major=mn_major_scales)
    if quantized.numel():
        _launch(gate_up, quantized, scales, counts, num_rows, masked=True)
    return quantized, scales


def _launch(gate_up: Tensor, quantized: Tensor, scales: Tensor, rows_of: Tensor | None, num_rows: int, *, masked: bool) -> None:
    width = quantized.shape[-1]
    num_blocks = ceil_div(width, BLOCK)
    blocks = min(BLOCKS, power_of_two(num_blocks))
    row_programs = ceil_div(num_rows, ROWS)
    if masked:
        row_programs = min(row_programs, MOST_ROW_PROGRAMS)
    launch(
        _swiglu_quantize_kernel,
        (row_programs, ceil_div(num_blocks, blocks), quantized.shape[0] if masked else 1),
        gate_up=gate_up,
        quantized=quantized,
        scales=scales,
        rows_of=rows_of,
        num_rows=num_rows,
        width=width,
        scale_expert_stride=scales.stride(0) if masked else 0,
        scale_row_stride=scales.stride(-2),
        scale_block_stride=scales.stride(-1),
        MASKED=masked,
        SKIPS=rows_of is not None and not masked,
        ROWS=ROWS,
        BLOCKS=blocks,
    )
