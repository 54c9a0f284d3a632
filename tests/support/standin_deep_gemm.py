"""A stand-in for the library DeepGEMM on CPU: its products' signatures, layouts and refusals (2.6.1), computed by torch.

For tests of the adapter only. Refuses what the library asserts on Hopper; rows that the library leaves alone stay as they were.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels import deep_gemm as adapter

FP8Pair = tuple[Tensor, Tensor]


class DGError(RuntimeError):
    """What the library's asserts raise."""


def _require(holds: bool, claim: str) -> None:
    if not holds:
        raise DGError(f"Assertion error (standin): {claim}")


def _check_major(x: Tensor) -> None:
    _require(x.dim() in (2, 3), "dim == 2 or dim == 3")
    if x.dim() == 3:
        _require(x.stride(0) == x.shape[-2] * x.shape[-1], "t.stride(0) == t.size(-2) * t.size(-1)")
    _require(x.stride(-1) == 1, "major == K")


def _check_left_scales(x: Tensor, scales: Tensor) -> None:
    rows, depth = x.shape[-2:]
    _require(scales.dtype is torch.float32, "sf.scalar_type() == torch::kFloat")
    _require(tuple(scales.shape) == (*x.shape[:-1], -(-depth // 128)), "sf.size(-1) == ceil_div(k, gran_k)")
    aligned = -(-rows // 4) * 4
    _require(scales.stride(-2) == 1 or rows == 1, "sf.stride(-2) == 1 or mn == 1")
    _require(scales.stride(-1) == aligned, "sf.stride(-1) == get_tma_aligned_size(mn, sf.element_size())")
    if scales.dim() == 3:
        _require(scales.stride(0) == aligned * scales.shape[-1], "sf.stride(-3) == sf.stride(-1) * sf.size(-1)")


def _check_right_scales(weight: Tensor, scales: Tensor) -> None:
    wanted = (weight.shape[0], -(-weight.shape[1] // 128), -(-weight.shape[2] // 128))
    _require(scales.dtype is torch.float32 and tuple(scales.shape) == wanted, "sf.size(-2) == ceil_div(mn, gran_mn)")
    _require(scales.is_contiguous(), "sf.stride(-1) == 1 and sf.stride(-2) == sf.size(-1)")


def _left(pair: FP8Pair) -> Tensor:
    x, scales = pair
    _require(x.dtype is torch.float8_e4m3fn, "ab.scalar_type() == torch::kFloat8_e4m3fn")
    _check_left_scales(x, scales)
    return x.float() * scales.repeat_interleave(128, -1)[..., : x.shape[-1]]


def _right(pair: FP8Pair) -> Tensor:
    weight, scales = pair
    _require(weight.dtype is torch.float8_e4m3fn, "ab.scalar_type() == torch::kFloat8_e4m3fn")
    _check_right_scales(weight, scales)
    spread = scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
    return weight.float() * spread[:, : weight.shape[1], : weight.shape[2]]


def _contiguous(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor, *, rows: Tensor, weights: Tensor) -> None:
    for x in (a, b, d):
        _check_major(x)
    _require(d.dtype is torch.bfloat16, "d.scalar_type() == torch::kBFloat16")
    _require(grouped_layout.dtype is torch.int32 and grouped_layout.is_contiguous(), "grouped_layout.scalar_type() == torch::kInt")
    _require(tuple(grouped_layout.shape) == (len(a),) and tuple(d.shape) == (len(a), b.shape[1]), "m == m_ and n == n_")
    for start in range(0, len(a), 128):
        experts = grouped_layout[start : start + 128].unique().tolist()
        _require(
            len(experts) == 1, "a tile of rows belongs to one group"
        )  # the library reads the first row's and corrupts the others
        if experts[0] >= 0:
            d[start : start + 128] = (rows[start : start + 128] @ weights[experts[0]].t()).to(d.dtype)


def _masked(a: Tensor, b: Tensor, d: Tensor, masked_m: Tensor, expected_m: int, *, rows: Tensor, weights: Tensor) -> None:
    for x in (a, b, d):
        _check_major(x)
    _require(d.dtype is torch.bfloat16, "d.scalar_type() == torch::kBFloat16")
    _require(masked_m.dtype is torch.int32 and masked_m.is_contiguous(), "masked_m.scalar_type() == torch::kInt")
    _require(expected_m > 0 and min(a.shape) > 0, "expected_m > 0 and m > 0 and n > 0 and k > 0")
    _require(tuple(d.shape) == (*a.shape[:2], b.shape[1]) and len(masked_m) == len(b) == len(a), "num_groups == num_groups_")
    for expert, count in enumerate(masked_m.tolist()):
        d[expert, :count] = (rows[expert, :count] @ weights[expert].t()).to(d.dtype)


def m_grouped_fp8_gemm_nt_contiguous(a: FP8Pair, b: FP8Pair, d: Tensor, grouped_layout: Tensor) -> None:
    _contiguous(a[0], b[0], d, grouped_layout, rows=_left(a), weights=_right(b))


def m_grouped_fp8_gemm_nt_masked(a: FP8Pair, b: FP8Pair, d: Tensor, masked_m: Tensor, expected_m: int) -> None:
    _masked(a[0], b[0], d, masked_m, expected_m, rows=_left(a), weights=_right(b))


def m_grouped_bf16_gemm_nt_contiguous(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor) -> None:
    _require(a.dtype is b.dtype is torch.bfloat16 and a.shape[1] % 64 == 0, "k % 64 == 0")
    _contiguous(a, b, d, grouped_layout, rows=a.float(), weights=b.float())


def m_grouped_bf16_gemm_nt_masked(a: Tensor, b: Tensor, d: Tensor, masked_m: Tensor, expected_m: int) -> None:
    _require(a.dtype is b.dtype is torch.bfloat16 and a.shape[2] % 64 == 0, "k % 64 == 0")
    _masked(a, b, d, masked_m, expected_m, rows=a.float(), weights=b.float())


def fp8_gemm_nt(a: FP8Pair, b: FP8Pair, d: Tensor) -> None:
    for x in (a[0], b[0], d):
        _check_major(x)
    _require(d.dtype is torch.bfloat16, "d.scalar_type() == torch::kBFloat16")
    _require(tuple(d.shape) == (len(a[0]), len(b[0])) and a[0].shape[1] == b[0].shape[1], "m == m_ and n == n_ and k == k_")
    weight, scales = b
    d.copy_(_left(a) @ _right((weight[None], scales[None]))[0].t())


def get_mk_alignment_for_contiguous_layout() -> int:
    return 128


FUNCTIONS = (
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
    m_grouped_bf16_gemm_nt_contiguous,
    m_grouped_bf16_gemm_nt_masked,
    fp8_gemm_nt,
    get_mk_alignment_for_contiguous_layout,
)


@contextmanager
def installed(**changes: Any) -> Iterator[ModuleType]:
    """`import deep_gemm` finds the stand-in, with `changes` to its attributes (None: without it)."""
    module = ModuleType("deep_gemm")
    attributes: dict[str, Any] = {function.__name__: function for function in FUNCTIONS} | {"__version__": "2.6.1"} | changes
    for name, value in attributes.items():
        if value is not None:
            setattr(module, name, value)
    before = sys.modules.get("deep_gemm")
    sys.modules["deep_gemm"] = module
    adapter._library.cache_clear()
    try:
        yield module
    finally:
        sys.modules.pop("deep_gemm")
        if before is not None:
            sys.modules["deep_gemm"] = before
        adapter._library.cache_clear()
