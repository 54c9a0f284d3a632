"""The experts' products from FP8 rows and FP8 weights, as a rank with DeepGEMM-like kernels runs them, in both layouts.

FP8 rows with scales come from the dispatch; grouped product, SwiGLU fused with the quantisation of its result, grouped product.
Knows the kernels' front functions only; where there is no GPU their torch references compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import bare_import  # noqa: F401  before anything of moesaic
import torch
from torch import Tensor

from moesaic.kernels.activation import swiglu_quantize, swiglu_quantize_masked
from moesaic.kernels.grouped_gemm import grouped_gemm_fp8_contiguous, grouped_gemm_fp8_masked
from moesaic.moe.dispatcher import ContiguousRows, ExpertRows, MaskedRows


@dataclass(frozen=True, kw_only=True)
class Fp8ContiguousRows(ContiguousRows):
    """hidden e4m3 [R, any]; scales fp32 [R, any / 128]."""

    scales: Tensor


@dataclass(frozen=True, kw_only=True)
class Fp8MaskedRows(MaskedRows):
    """hidden e4m3 [E, M, any]; scales fp32 [E, M, any / 128]; expected_rows of an expert, for the choice of tiles."""

    scales: Tensor
    expected_rows: int


@dataclass(frozen=True, kw_only=True)
class Fp8ExpertWeights:
    """gate_up e4m3 [E, 2 * I, H] (gate first), down e4m3 [E, H, I]; fp32 scales [E, rows / 128, columns / 128]."""

    gate_up: Tensor
    gate_up_scales: Tensor
    down: Tensor
    down_scales: Tensor

    def first(self, num_experts: int) -> Fp8ExpertWeights:
        """The same memory, fewer experts."""
        parts = (self.gate_up, self.gate_up_scales, self.down, self.down_scales)
        gate_up, gate_up_scales, down, down_scales = (part[:num_experts] for part in parts)
        return Fp8ExpertWeights(gate_up=gate_up, gate_up_scales=gate_up_scales, down=down, down_scales=down_scales)


class Fp8ExpertRunner:
    """An `ExpertRunner` for rows of the two classes above; outputs are of `dtype`."""

    def __init__(self, weights: Fp8ExpertWeights, dtype: torch.dtype) -> None:
        self._weights = weights
        self._dtype = dtype

    @property
    def inner_size(self) -> int:
        return self._weights.down.shape[2]

    def run(self, rows: ExpertRows) -> Tensor:
        return self.down(self.gate_up(rows))

    def gate_up(self, rows: ExpertRows) -> ExpertRows:
        weights = self._weights
        gate_up = self._product(rows, weights.gate_up, weights.gate_up_scales)
        if isinstance(rows, Fp8MaskedRows):
            inner, scales = swiglu_quantize_masked(gate_up, rows.counts)
            return Fp8MaskedRows(hidden=inner, scales=scales, counts=rows.counts, expected_rows=rows.expected_rows)
        assert isinstance(rows, Fp8ContiguousRows), "the loopback dispatcher delivers FP8"
        inner, scales = swiglu_quantize(gate_up)
        return Fp8ContiguousRows(hidden=inner, scales=scales, counts=rows.counts)

    def down(self, inner: ExpertRows) -> Tensor:
        return self._product(inner, self._weights.down, self._weights.down_scales)

    def _product(self, rows: ExpertRows, weight: Tensor, scales: Tensor) -> Tensor:
        if isinstance(rows, Fp8ContiguousRows):
            return grouped_gemm_fp8_contiguous(rows.hidden, rows.scales, weight, scales, rows.counts, out_dtype=self._dtype)
        assert isinstance(rows, Fp8MaskedRows), "the loopback dispatcher delivers FP8"
        return grouped_gemm_fp8_masked(
            rows.hidden,
            rows.scales,
            weight,
            scales,
            rows.counts,
            expected_rows=rows.expected_rows,
            out_dtype=self._dtype,
        )
