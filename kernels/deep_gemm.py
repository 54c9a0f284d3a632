"""Grouped and dense matrix products by DeepGEMM (github.com/deepseek-ai/DeepGEMM): our contract in its terms. Not run on hardware.

Knows the library's functions for Hopper and their layouts: rows per expert at multiples of 128 with the expert of each row (int32)
beside them, or a fixed block per expert with int32 counts; fp32 scales per 1x128 with rows running fastest (as `quantize_per_token`
gives them with `mn_major_scales`) and per 128x128; results in bf16. Signatures and limits were read from its sources, 2.6.1.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.checks import INDICES, check_tensor
from moesaic.kernels.gpu import upload
from moesaic.kernels.grouped_backends import dense_unfit_reason
from moesaic.kernels.quant import empty_scales

ALIGNMENT = 128
"""Rows of a tile: in the contiguous layout each expert's rows begin at a multiple of it."""
PLAIN_DEPTH = 64
"""bf16 products want K to be a multiple of it."""
TMA_BYTES = 16
FUNCTIONS = (
    *(f"m_grouped_{kind}_gemm_nt_{layout}" for kind in ("fp8", "bf16") for layout in ("contiguous", "masked")),
    "fp8_gemm_nt",
)
PACKAGE = "deep_gemm (pip install sgl-deep-gemm)"


def missing_reason() -> str | None:
    """Why the library can't be used in this process; None if it can. Imports it."""
    try:
        module = _library()
    except Exception as error:  # its import runs nvcc's finder, loads CUDA and a binary tied to one torch: anything may fail
        return f"{PACKAGE} can't be imported: {type(error).__name__}: {error}"
    lacking = [name for name in FUNCTIONS if not hasattr(module, name)]
    if lacking:
        return f"deep_gemm {getattr(module, '__version__', 'of unknown version')} has no {lacking[0]}: install {PACKAGE}"
    alignment = module.get_mk_alignment_for_contiguous_layout()
    if alignment != ALIGNMENT:
        return f"deep_gemm aligns an expert's rows to {alignment}, wanted {ALIGNMENT}: leave its alignment alone"
    return None


@cache
def _library() -> Any:
    return importlib.import_module("deep_gemm")


def grouped_gemm_contiguous(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """As `kernels.grouped_gemm.grouped_gemm_contiguous`, for bf16, weight [E, N, K] contiguous, counts multiples of 128.

    Raises ValueError.
    """
    function = "grouped_gemm_contiguous (deep_gemm)"
    check_tensor(function, "x", x, shape=(None, None), dtypes=(torch.bfloat16,), contiguous=True)
    _check_sizes(function, x, weight)
    _check_aligned(function, counts)
    out = x.new_empty(x.shape[0], weight.shape[1])
    if out.numel():
        _library().m_grouped_bf16_gemm_nt_contiguous(x, weight, out, _expert_of_row(counts, x))
    return out


def grouped_gemm_masked(x: Tensor, weight: Tensor, counts: Tensor, *, expected_rows: int | None = None) -> Tensor:
    """As `kernels.grouped_gemm.grouped_gemm_masked`, for bf16, weight [E, N, K] contiguous. Raises ValueError."""
    function = "grouped_gemm_masked (deep_gemm)"
    check_tensor(function, "x", x, shape=(None, None, None), dtypes=(torch.bfloat16,), contiguous=True)
    _check_sizes(function, x, weight)
    check_tensor(function, "counts", counts, shape=x.shape[:1], dtypes=INDICES, like=x)
    out = x.new_empty(*x.shape[:2], weight.shape[1])
    if out.numel():
        _library().m_grouped_bf16_gemm_nt_masked(x, weight, out, counts.int(), _expected(x, expected_rows))
    return out


def grouped_gemm_fp8_contiguous(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    counts: list[int],
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """As `kernels.grouped_gemm.grouped_gemm_fp8_contiguous`, whose checks have been made; counts multiples of 128, bf16 only.

    Raises ValueError.
    """
    function = "grouped_gemm_fp8_contiguous (deep_gemm)"
    _check_fp8_sizes(function, weight, out_dtype)
    _check_aligned(function, counts)
    out = x.new_empty(x.shape[0], weight.shape[1], dtype=out_dtype)
    if out.numel():
        scales = _rows_fastest(x, x_scales)
        _library().m_grouped_fp8_gemm_nt_contiguous((x, scales), (weight, weight_scales), out, _expert_of_row(counts, x))
    return out


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
    """As `kernels.grouped_gemm.grouped_gemm_fp8_masked`, whose checks have been made; bf16 only. Raises ValueError."""
    _check_fp8_sizes("grouped_gemm_fp8_masked (deep_gemm)", weight, out_dtype)
    out = x.new_empty(*x.shape[:2], weight.shape[1], dtype=out_dtype)
    if out.numel():
        scales, expected = _rows_fastest(x, x_scales), _expected(x, expected_rows)
        _library().m_grouped_fp8_gemm_nt_masked((x, scales), (weight, weight_scales), out, counts.int(), expected)
    return out


def fp8_gemm(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """As `kernels.fp8_gemm.fp8_gemm`, whose checks have been made; bf16 only, N a multiple of 64, K of 128. Raises ValueError."""
    width, depth = weight.shape
    reason = dense_unfit_reason("deep_gemm", width, depth)
    if reason is not None:
        raise ValueError(f"fp8_gemm (deep_gemm): {reason}")
    _check_out("fp8_gemm (deep_gemm)", out_dtype)
    out = x.new_empty(len(x), width, dtype=out_dtype)
    if out.numel():
        _library().fp8_gemm_nt((x, _rows_fastest(x, x_scales)), (weight, weight_scales), out)
    return out


def _expert_of_row(counts: list[int], x: Tensor) -> Tensor:
    """int32 [M]. The CPU does not wait."""
    experts = torch.arange(len(counts), dtype=torch.int32, device=x.device)
    return experts.repeat_interleave(upload(torch.tensor(counts, dtype=torch.int32), x.device), output_size=x.shape[0])


def _expected(x: Tensor, expected_rows: int | None) -> int:
    """What the library sizes its tiles by; it wants at least 1."""
    return max(1, x.shape[1] if expected_rows is None else min(expected_rows, x.shape[1]))


def _rows_fastest(x: Tensor, x_scales: Tensor) -> Tensor:
    """The scales with rows running fastest, columns at multiples of 16 bytes. The library would copy them too, but not say so."""
    wanted = empty_scales(x, mn_major=True)
    return x_scales if x_scales.stride() == wanted.stride() else wanted.copy_(x_scales)


def _check_sizes(function: str, x: Tensor, weight: Tensor) -> None:
    num_experts = x.shape[0] if x.dim() == 3 else None
    check_tensor(function, "weight", weight, shape=(num_experts, None, x.shape[-1]), dtypes=(x.dtype,), like=x, contiguous=True)
    if x.shape[-1] % PLAIN_DEPTH:
        raise ValueError(f"{function}: K is {x.shape[-1]}, wanted a multiple of {PLAIN_DEPTH}")
    _check_width(function, weight)


def _check_fp8_sizes(function: str, weight: Tensor, out_dtype: torch.dtype) -> None:
    _check_out(function, out_dtype)
    if weight.shape[2] % TMA_BYTES:
        raise ValueError(f"{function}: K is {weight.shape[2]}, wanted a multiple of {TMA_BYTES}")
    _check_width(function, weight)


def _check_out(function: str, out_dtype: torch.dtype) -> None:
    if out_dtype is not torch.bfloat16:
        raise ValueError(f"{function}: out_dtype is {out_dtype}, wanted torch.bfloat16")


def _check_width(function: str, weight: Tensor) -> None:
    if 2 * weight.shape[1] % TMA_BYTES:
        raise ValueError(f"{function}: N is {weight.shape[1]}, wanted a multiple of {TMA_BYTES // 2}: rows of the result in bf16")


def _check_aligned(function: str, counts: list[int]) -> None:
    if any(count % ALIGNMENT for count in counts):
        raise ValueError(
            f"{function}: counts are {counts}, wanted multiples of {ALIGNMENT}: pad each expert's rows when they are laid out"
        )
