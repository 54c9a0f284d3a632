"""Grouped matrix product with CuTe DSL, for both layouts: what is refused, what is compiled for which sizes, and the launch.

The kernel is in grouped_kernel.py. Compiled for Hopper, not run on hardware. In the masked layout all sizes are constants of the
code; in the contiguous one the number of rows is told at the launch.
"""

from functools import cache
from typing import Any

import cutlass
import torch
from cutlass import cute
from cutlass.cute.runtime import from_dlpack, make_fake_compact_tensor, make_fake_stream, make_fake_tensor
from torch import Tensor

from moesaic.kernels.checks import INDICES, check_tensor
from moesaic.kernels.cute.grouped_kernel import ROWS, GroupedGemm
from moesaic.kernels.gpu import upload
from moesaic.kernels.quant import BLOCK, FP8, empty_scales

ALIGNMENT = ROWS
"""In the contiguous layout each expert's rows begin at a multiple of it."""
TMA_BYTES = 16
HOPPER_PROCESSORS = 132
K_FASTEST = (1, 0, 2)


@cache
def compile_masked(
    num_experts: int, room: int, width: int, depth: int, *, scaled: bool, num_blocks: int = HOPPER_PROCESSORS, options: str = ""
) -> Any:
    """The kernel for x [E, room, depth] and weight [E, width, depth], compiled; sizes are constants of the code."""
    a = _fake(_kind(scaled), (room, depth, num_experts), K_FASTEST)
    out = _fake(cutlass.BFloat16, (room, width, num_experts), K_FASTEST)
    blocks, padded = depth // BLOCK, -(-room // 4) * 4
    scales = make_fake_tensor(cutlass.Float32, (room, blocks, num_experts), (1, padded, padded * blocks), assumed_align=4)
    kernel = GroupedGemm(num_blocks=num_blocks, scaled=scaled, contiguous=False)
    return _compiled(kernel, a, out, scales, (num_experts, width, depth), options)


@cache
def compile_contiguous(
    num_experts: int, width: int, depth: int, *, scaled: bool, num_blocks: int = HOPPER_PROCESSORS, options: str = ""
) -> Any:
    """The kernel for x [any multiple of 128, depth] and weight [E, width, depth], compiled."""
    a, out, scales = contiguous_forms(width, depth, scaled=scaled)
    kernel = GroupedGemm(num_blocks=num_blocks, scaled=scaled, contiguous=True)
    return _compiled(kernel, a, out, scales, (num_experts, width, depth), options)


def contiguous_forms(width: int, depth: int, *, scaled: bool) -> tuple[Any, Any, Any]:
    """x, the result and the scales of x as `compile_contiguous` is told of them; `as_cute` gives tensors of just these forms."""
    rows = cute.sym_int32(divisibility=ROWS)
    # A dimension of 1 has stride 0: DLPack's tensors come like that.
    a, out = (
        make_fake_tensor(kind, (rows, columns, 1), (columns, 1, 0), assumed_align=TMA_BYTES)
        for kind, columns in ((_kind(scaled), depth), (cutlass.BFloat16, width))
    )
    stride = cute.sym_int64(divisibility=ROWS)
    return a, out, make_fake_tensor(cutlass.Float32, (rows, depth // BLOCK, 1), (1, stride, 0), assumed_align=4)


def _compiled(kernel: GroupedGemm, a: Any, out: Any, a_scales: Any, weight: tuple[int, int, int], options: str) -> Any:
    num_experts, width, depth = weight
    b = _fake(_kind(kernel.scaled), (width, depth, num_experts), K_FASTEST)
    b_scales = _fake(cutlass.Float32, (width // BLOCK, depth // BLOCK, num_experts), K_FASTEST, alignment=4)
    counts = make_fake_compact_tensor(cutlass.Int32, (num_experts,), assumed_align=4)
    scales = (a_scales, b_scales) if kernel.scaled else (None, None)
    return cute.compile(kernel, a, b, out, *scales, counts, make_fake_stream(), **({"options": options} if options else {}))


def _kind(scaled: bool) -> Any:
    return cutlass.Float8E4M3FN if scaled else cutlass.BFloat16


def _fake(kind: Any, shape: tuple[Any, ...], stride_order: tuple[int, ...], alignment: int = TMA_BYTES) -> Any:
    return make_fake_compact_tensor(kind, shape, stride_order=stride_order, assumed_align=alignment)


def grouped_gemm_contiguous(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """As `kernels.grouped_gemm.grouped_gemm_contiguous`, for bf16 on a CUDA device, counts multiples of 128. Raises ValueError."""
    function = "grouped_gemm_contiguous (cutlass)"
    check_tensor(function, "x", x, shape=(None, None), dtypes=(torch.bfloat16,), contiguous=True)
    return _run(function, x, weight, _aligned(function, counts, x), scales=(None, None))


def grouped_gemm_masked(x: Tensor, weight: Tensor, counts: Tensor, *, expected_rows: int | None = None) -> Tensor:
    """As `kernels.grouped_gemm.grouped_gemm_masked`, for bf16 on a CUDA device. Raises ValueError."""
    function = "grouped_gemm_masked (cutlass)"
    check_tensor(function, "x", x, shape=(None, None, None), dtypes=(torch.bfloat16,), contiguous=True)
    return _run(function, x, weight, counts, scales=(None, None))


def grouped_gemm_fp8_contiguous(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """As `kernels.grouped_gemm.grouped_gemm_fp8_contiguous`, on a CUDA device: counts, K and N multiples of 128, bf16 only.

    Raises ValueError.
    """
    function = "grouped_gemm_fp8_contiguous (cutlass)"
    scales = _checked_scales(function, x, x_scales, weight, weight_scales, out_dtype)
    return _run(function, x, weight, _aligned(function, counts, x), scales=scales)


def grouped_gemm_fp8_masked(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: Tensor,
    *,
    expected_rows: int | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """As `kernels.grouped_gemm.grouped_gemm_fp8_masked`, on a CUDA device: K and N multiples of 128, bf16 only.

    `expected_rows` change nothing. Raises ValueError.
    """
    function = "grouped_gemm_fp8_masked (cutlass)"
    return _run(function, x, weight, counts, scales=_checked_scales(function, x, x_scales, weight, weight_scales, out_dtype))


def _aligned(function: str, counts: list[int], x: Tensor) -> Tensor:
    if any(count % ALIGNMENT for count in counts):
        raise ValueError(f"{function}: counts are {counts}, wanted multiples of {ALIGNMENT}: pad each expert's rows")
    return upload(torch.tensor(counts, dtype=torch.int32), x.device)


def _checked_scales(
    function: str, x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both scales as the kernel wants them: those of the rows with rows running fastest. Raises ValueError."""
    if x.dtype is not FP8 or x.shape[-1] % BLOCK or weight.shape[1] % BLOCK or out_dtype is not torch.bfloat16:
        got = f"x is {x.dtype}, K {x.shape[-1]}, N {weight.shape[1]}, out_dtype {out_dtype}"
        raise ValueError(f"{function}: {got}, wanted {FP8}, multiples of {BLOCK} and torch.bfloat16")
    wanted = empty_scales(x, mn_major=True)
    if tuple(x_scales.shape) != tuple(wanted.shape) or x_scales.dtype is not torch.float32:
        got = f"{x_scales.dtype} {list(x_scales.shape)}"
        raise ValueError(f"{function}: x_scales is {got}, wanted torch.float32 {list(wanted.shape)}")
    shape = (weight.shape[0], weight.shape[1] // BLOCK, weight.shape[2] // BLOCK)
    check_tensor(function, "weight_scales", weight_scales, shape=shape, dtypes=(torch.float32,), like=x, contiguous=True)
    return x_scales if x_scales.stride() == wanted.stride() else wanted.copy_(x_scales), weight_scales


def _run(function: str, x: Tensor, weight: Tensor, counts: Tensor, *, scales: tuple[Tensor | None, Tensor | None]) -> Tensor:
    masked, depth = x.dim() == 3, x.shape[-1]
    num_experts = x.shape[0] if masked else counts.shape[0]
    check_tensor(function, "weight", weight, shape=(num_experts, None, depth), dtypes=(x.dtype,), like=x, contiguous=True)
    check_tensor(function, "counts", counts, shape=(num_experts,), dtypes=INDICES, like=x)
    width, scaled = weight.shape[1], scales[0] is not None
    if not x.is_cuda or depth * x.element_size() % TMA_BYTES or width * 2 % TMA_BYTES:
        raise ValueError(f"{function}: x {list(x.shape)} on {x.device}, N {width}; wanted CUDA, rows of whole {TMA_BYTES} bytes")
    out = x.new_empty(*x.shape[:-1], width, dtype=torch.bfloat16)
    if not out.numel():
        return out
    blocks = torch.cuda.get_device_properties(x.device).multi_processor_count
    if masked:
        compiled = compile_masked(num_experts, x.shape[1], width, depth, scaled=scaled, num_blocks=blocks)
    else:
        compiled = compile_contiguous(num_experts, width, depth, scaled=scaled, num_blocks=blocks)
    a, b, to = as_cute(x), as_cute(weight), as_cute(out)
    factors = [None if one is None else as_cute(one, alignment=4, rows_fastest=one is scales[0]) for one in scales]
    stream = torch.cuda.current_stream(x.device).cuda_stream
    compiled(a, b, to, *factors, from_dlpack(counts.int(), assumed_align=4), stream)
    return out


def as_cute(tensor: Tensor, *, alignment: int = TMA_BYTES, rows_fastest: bool = False) -> Any:
    """As the compiled kernel takes it: experts last, 1 of them and any number of rows where `tensor` has none.

    FP8 goes as bytes: not every DLPack knows it.
    """
    plain = tensor.view(torch.uint8) if tensor.dtype is FP8 else tensor
    if plain.dim() == 3:
        seen = from_dlpack(plain.permute(1, 2, 0), assumed_align=alignment)
    else:
        rows, columns = plain.shape
        strides = (1, rows, rows) if rows_fastest else (columns, 1, columns)
        seen = from_dlpack(plain.as_strided((rows, columns, 1), strides), assumed_align=alignment)
        # stride_order here is torch's dim_order: outermost first.
        seen.mark_compact_shape_dynamic(mode=0, stride_order=(1, 2, 0) if rows_fastest else (0, 2, 1), divisibility=ROWS)
    if tensor.dtype is FP8:
        seen.element_type = cutlass.Float8E4M3FN
    return seen
