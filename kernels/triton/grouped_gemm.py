"""Grouped matrix product on Hopper: one persistent kernel for both layouts, bf16 (fp16, fp32) and FP8 with 128-element scales.

A dense FP8 product is that of a single group. Each program walks over output tiles, experts first; which expert a tile belongs to
follows from the counts, which stay on the device. Tiles come through the tensor memory accelerator (TMA). Rows of one expert need
not start at a multiple of anything: a tile may read into the next expert's rows, and stores only its own. Sums run over K in order
whatever the other rows are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moesaic.kernels.checks import FLOATS, INDICES, check_tensor
from moesaic.kernels.gpu import upload
from moesaic.kernels.quant import BLOCK, FP8
from moesaic.kernels.triton.launch import ceil_div, launch, num_processors, power_of_two

FEW_ROWS = 64
"""Up to so many rows per expert, tiles are 64 rows high."""
DENSE_COLUMNS = (128, 64, 32)
"""Columns of a dense product's tile: the most with which there is a tile for every multiprocessor, else the least."""
TMA_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Rows, columns and depth of a tile, and how it is computed."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def tiling_for(dtype: torch.dtype, rows_per_expert: int) -> Tiling:
    """Hopper's tile for the dtype of the rows: as large as its registers and shared memory carry."""
    few = rows_per_expert <= FEW_ROWS
    if dtype is FP8:
        return Tiling(rows=64 if few else 128, columns=128, depth=128, num_warps=4 if few else 8, num_stages=4)
    if dtype is torch.float32:
        return Tiling(rows=64, columns=64, depth=32, num_warps=4, num_stages=3)
    if few:
        return Tiling(rows=64, columns=128, depth=64, num_warps=4, num_stages=4)
    return Tiling(rows=128, columns=256, depth=64, num_warps=8, num_stages=3)


def dense_tiling(num_rows: int, width: int, processors: int) -> Tiling:
    """The tile of a dense FP8 product. Few rows read the whole weight all the same: it takes many multiprocessors to do so fast."""
    tiling = tiling_for(FP8, num_rows)
    row_tiles = ceil_div(num_rows, tiling.rows)
    enough = (columns for columns in DENSE_COLUMNS if row_tiles * ceil_div(width, columns) >= processors)
    return replace(tiling, columns=next(enough, DENSE_COLUMNS[-1]))


@triton.jit(do_not_specialize=["num_rows", "a_scale_block"])
def _grouped_kernel(
    a: tl.tensor,
    b: tl.tensor,
    out: tl.tensor,
    a_scales: tl.tensor,
    b_scales: tl.tensor,
    counts: tl.tensor,
    num_experts: tl.tensor,
    num_rows: tl.tensor,
    room: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    a_scale_expert: tl.tensor,
    a_scale_row: tl.tensor,
    a_scale_block: tl.tensor,
    b_scale_expert: tl.tensor,
    b_scale_row: tl.tensor,
    COUNTED: tl.constexpr,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    OUT_FASTEST: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    experts = tl.arange(0, EXPERTS)
    if COUNTED:
        count = tl.load(counts + experts, mask=experts < num_experts, other=0).to(tl.int32)
    else:
        count = tl.where(experts < num_experts, num_rows, 0).to(tl.int32)
    start = experts * room if MASKED else tl.cumsum(count, axis=0) - count
    column_tiles = tl.cdiv(width, COLUMNS)
    tiles = (count + ROWS - 1) // ROWS * column_tiles
    end = tl.cumsum(tiles, axis=0)
    for tile in range(tl.program_id(0), tl.sum(tiles, axis=0), tl.num_programs(0)):
        expert = tl.sum((end <= tile).to(tl.int32), axis=0)
        here = experts == expert
        rows_here = tl.sum(tl.where(here, count, 0), axis=0)
        first = tl.sum(tl.where(here, start, 0), axis=0)
        place = tile - tl.sum(tl.where(here, end - tiles, 0), axis=0)
        row_tiles = (rows_here + ROWS - 1) // ROWS
        top, left = place % row_tiles * ROWS, place // row_tiles * COLUMNS
        rows = top + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for k in range(tl.cdiv(depth, DEPTH)):
            left_tile = a.load([first + top, k * DEPTH])
            if OUT_FASTEST:
                right_tile = b.load([expert, k * DEPTH, left]).reshape(DEPTH, COLUMNS)
            else:
                right_tile = b.load([expert, left, k * DEPTH]).reshape(COLUMNS, DEPTH).T
            if SCALED:
                own = rows if MASKED else first + rows
                a_place = a_scales + expert.to(tl.int64) * a_scale_expert + own.to(tl.int64) * a_scale_row + k * a_scale_block
                a_scale = tl.load(a_place, mask=rows < rows_here, other=0.0)
                b_scale = tl.load(b_scales + expert.to(tl.int64) * b_scale_expert + left // 128 * b_scale_row + k)
                total += tl.dot(left_tile, right_tile) * (a_scale * b_scale)[:, None]
            else:
                total = tl.dot(left_tile, right_tile, total, input_precision=PRECISION)
        columns = left + tl.arange(0, COLUMNS)
        target = out + (first + rows).to(tl.int64)[:, None] * width + columns[None, :]
        valid = (rows < rows_here)[:, None] & (columns < width)[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=valid)


def grouped_gemm_contiguous(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """As `kernels.grouped_gemm.grouped_gemm_contiguous`."""
    function = "grouped_gemm_contiguous"
    _check_plain(function, x, weight, rank=2)
    out = x.new_empty(x.shape[0], weight.shape[1])
    device_counts = upload(torch.tensor(counts, dtype=torch.int32), x.device)
    _launch(function, x, weight, device_counts, out, None, None, rows_per_expert=max(counts, default=0))
    return out


def grouped_gemm_masked(x: Tensor, weight: Tensor, counts: Tensor, *, expected_rows: int | None = None) -> Tensor:
    """As `kernels.grouped_gemm.grouped_gemm_masked`."""
    function = "grouped_gemm_masked"
    _check_plain(function, x, weight, rank=3)
    check_tensor(function, "counts", counts, shape=x.shape[:1], dtypes=INDICES, like=x)
    out = x.new_empty(*x.shape[:2], weight.shape[1])
    _launch(function, x, weight, counts, out, None, None, rows_per_expert=_expected(x, expected_rows))
    return out


def _expected(x: Tensor, expected_rows: int | None) -> int:
    return x.shape[1] if expected_rows is None else expected_rows


def _check_plain(function: str, x: Tensor, weight: Tensor, *, rank: int) -> None:
    check_tensor(function, "x", x, shape=(None,) * rank, dtypes=FLOATS, contiguous=True)
    if weight.dim() != 3 or (rank == 3 and weight.shape[0] != x.shape[0]) or weight.shape[2] != x.shape[-1]:
        raise ValueError(f"{function}: weight has shape {list(weight.shape)}, wanted [experts, any, {x.shape[-1]}]")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"{function}: weight is {weight.dtype} on {weight.device}, wanted {x.dtype} on {x.device} as x")


def grouped_gemm_fp8_contiguous(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, counts: list[int], *, out_dtype: torch.dtype
) -> Tensor:
    """As `kernels.grouped_gemm.grouped_gemm_fp8_contiguous`, whose checks have been made."""
    out = x.new_empty(x.shape[0], weight.shape[1], dtype=out_dtype)
    device_counts = upload(torch.tensor(counts, dtype=torch.int32), x.device)
    rows = max(counts, default=0)
    function = "grouped_gemm_fp8_contiguous"
    _launch(function, x, weight, device_counts, out, x_scales, weight_scales, rows_per_expert=rows)
    return out


def grouped_gemm_fp8_masked(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: Tensor,
    *,
    expected_rows: int | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `kernels.grouped_gemm.grouped_gemm_fp8_masked`, whose checks have been made."""
    out = x.new_empty(*x.shape[:2], weight.shape[1], dtype=out_dtype)
    rows = _expected(x, expected_rows)
    _launch("grouped_gemm_fp8_masked", x, weight, counts, out, x_scales, weight_scales, rows_per_expert=rows)
    return out


def fp8_gemm(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """As `kernels.fp8_gemm.fp8_gemm`, whose checks have been made; K a multiple of 16. Raises ValueError."""
    out = x.new_empty(len(x), len(weight), dtype=out_dtype)
    tiling = dense_tiling(len(x), len(weight), num_processors(x.device))
    _launch("fp8_gemm", x, weight[None], None, out, x_scales, weight_scales[None], rows_per_expert=len(x), tiling=tiling)
    return out


def _launch(
    function: str,
    x: Tensor,
    weight: Tensor,
    counts: Tensor | None,
    out: Tensor,
    x_scales: Tensor | None,
    weight_scales: Tensor | None,
    *,
    rows_per_expert: int,
    tiling: Tiling | None = None,
) -> None:
    """Without counts all rows are those of the only expert."""
    if not out.numel():
        return
    tiling, masked = tiling or tiling_for(x.dtype, rows_per_expert), x.dim() == 3
    rows, (num_experts, width, depth) = x.view(-1, x.shape[-1]), weight.shape
    right, block, out_fastest = _right_side(function, weight, tiling)
    _check_tma(function, "x", rows)
    scaled = x_scales is not None and weight_scales is not None
    launch(
        _grouped_kernel,
        (num_processors(x.device),),
        a=TensorDescriptor.from_tensor(rows, [tiling.rows, tiling.depth]),
        b=TensorDescriptor.from_tensor(right, block),
        out=out,
        a_scales=x_scales,
        b_scales=weight_scales,
        counts=counts,
        num_experts=num_experts,
        num_rows=rows_per_expert,
        room=x.shape[1] if masked else 0,
        width=width,
        depth=depth,
        a_scale_expert=x_scales.stride(0) if x_scales is not None and masked else 0,
        a_scale_row=0 if x_scales is None else x_scales.stride(-2),
        a_scale_block=0 if x_scales is None else x_scales.stride(-1),
        b_scale_expert=0 if weight_scales is None else weight_scales.stride(0),
        b_scale_row=0 if weight_scales is None else weight_scales.stride(1),
        COUNTED=counts is not None,
        MASKED=masked,
        SCALED=scaled,
        OUT_FASTEST=out_fastest,
        EXPERTS=power_of_two(num_experts),
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        DEPTH=tiling.depth,
        PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def _right_side(function: str, weight: Tensor, tiling: Tiling) -> tuple[Tensor, list[int], bool]:
    """The weight as it lies in memory, its block, and whether its output dimension runs fastest there."""
    if weight.is_contiguous():
        _check_tma(function, "weight", weight)
        return weight, [1, tiling.columns, tiling.depth], False
    turned = weight.transpose(1, 2)
    if not turned.is_contiguous():
        strides = list(weight.stride())
        raise ValueError(f"{function}: weight has strides {strides}, wanted [E, N, K] or [E, K, N] without gaps in memory")
    _check_tma(function, "weight", turned)
    return turned, [1, tiling.depth, tiling.columns], True


def _check_tma(function: str, argument: str, x: Tensor) -> None:
    row_bytes = x.shape[-1] * x.element_size()
    if row_bytes % TMA_BYTES or x.data_ptr() % TMA_BYTES:
        where = f"rows of {row_bytes} bytes at address {x.data_ptr():#x}"
        raise ValueError(f"{function}: {argument} has {where}, wanted both to be multiples of {TMA_BYTES}: pad the dimension")


assert BLOCK == 128, "the kernel's scales are per 128"
