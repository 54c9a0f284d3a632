"""Expert runners for devices: bf16 rows by a chosen grouped product, or FP8 from the dispatch to the second product's sums.

Knows the backends by name (kernels/grouped_backends.py) and takes one for each product by its rows per expert; launches nothing
itself. The same code runs on CPU with backend "torch", where the products dequantise to fp32: right, and slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesaic.kernels.activation import swiglu, swiglu_quantize, swiglu_quantize_masked
from moesaic.kernels.grouped_backends import BACKENDS, Kind, Name, choose
from moesaic.kernels.grouped_gemm import (
    grouped_gemm_contiguous,
    grouped_gemm_fp8_contiguous,
    grouped_gemm_fp8_masked,
    grouped_gemm_masked,
)
from moesaic.kernels.quant import empty_scales, quantize_per_token
from moesaic.moe.dispatcher import ContiguousRows, ExpertRows
from moesaic.moe.experts import ExpertRunner, ExpertWeights, TorchExpertRunner


def make_expert_runner(
    backends: Sequence[Name], weights: ExpertWeights, *, dtype: torch.dtype, fp8_activations: bool = False
) -> ExpertRunner:
    """The runner for these weights, whose products one of `backends` computes, the table's choice if there are several.

    FP8 weights run in FP8 from end to end. With `fp8_activations`, weights in `dtype` hold dequantised FP8 blocks and rows are
    rounded to FP8, which only torch simulates. Raises ValueError for names that aren't known, and for none.
    """
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown or not backends:
        raise ValueError(f"expert runner backends are {list(backends)}, wanted one or more of {', '.join(BACKENDS)}")
    if weights.gate_up_scales is not None:
        return Fp8ExpertRunner(weights=weights, backends=backends, dtype=dtype)
    if tuple(backends) == ("torch",):
        return TorchExpertRunner(weights, fp8_activations=fp8_activations)
    if fp8_activations:
        raise ValueError(f"expert runner backends {list(backends)} want FP8 weights for FP8 rows; only 'torch' simulates them")
    return PlainDeviceRunner(weights, backends)


class PlainDeviceRunner:
    """Rows and weights in one dtype. What comes as FP8 is refused: a dispatch that quantises needs FP8 experts."""

    def __init__(self, weights: ExpertWeights, backends: Sequence[Name]) -> None:
        kind: Kind = "float32" if weights.down.dtype is torch.float32 else "bfloat16"
        self._weights, self._backends, self._kind = weights, backends, kind

    @property
    def inner_size(self) -> int:
        return self._weights.down.shape[2]

    def run(self, rows: ExpertRows) -> Tensor:
        return self.down(self.gate_up(rows))

    def gate_up(self, rows: ExpertRows) -> ExpertRows:
        assert rows.scales is None, "FP8 rows need FP8 experts"
        return replace(rows, hidden=swiglu(self._product(rows, self._weights.gate_up)))

    def down(self, inner: ExpertRows) -> Tensor:
        return self._product(inner, self._weights.down)

    def _product(self, rows: ExpertRows, weight: Tensor) -> Tensor:
        backend = _backend_for(rows, self._kind, self._backends)
        if isinstance(rows, ContiguousRows):
            return grouped_gemm_contiguous(rows.hidden, weight, rows.counts, backend=backend)
        return grouped_gemm_masked(rows.hidden, weight, rows.counts, expected_rows=rows.expected_rows, backend=backend)


@dataclass(frozen=True, kw_only=True)
class Fp8ExpertRunner:
    """FP8 weights and rows; sums in fp32, rounded to `dtype` between the first product and the activation, and at the end.

    Rows that a dispatch has quantised are taken as they are, others are quantised per 1x128 first. Rows between the products are
    FP8, made by the kernel that computes the activation.
    """

    weights: ExpertWeights
    backends: Sequence[Name]
    dtype: torch.dtype

    @property
    def inner_size(self) -> int:
        return self.weights.down.shape[2]

    def run(self, rows: ExpertRows) -> Tensor:
        return self.down(self.gate_up(rows))

    def gate_up(self, rows: ExpertRows) -> ExpertRows:
        both = self._product(_quantized(rows), self.weights.gate_up, self.weights.gate_up_scales)
        if isinstance(rows, ContiguousRows):
            hidden, scales = swiglu_quantize(both, mn_major_scales=True)
        else:
            hidden, scales = swiglu_quantize_masked(both, rows.counts, mn_major_scales=True)
        return replace(rows, hidden=hidden, scales=scales)

    def down(self, inner: ExpertRows) -> Tensor:
        return self._product(_quantized(inner), self.weights.down, self.weights.down_scales)

    def _product(self, rows: ExpertRows, weight: Tensor, weight_scales: Tensor | None) -> Tensor:
        assert rows.scales is not None and weight_scales is not None, "FP8 values come with their scales"
        backend = _backend_for(rows, "fp8", self.backends)
        if isinstance(rows, ContiguousRows):
            return grouped_gemm_fp8_contiguous(
                rows.hidden, rows.scales, weight, weight_scales, rows.counts, out_dtype=self.dtype, backend=backend
            )
        return grouped_gemm_fp8_masked(
            rows.hidden,
            rows.scales,
            weight,
            weight_scales,
            rows.counts,
            expected_rows=rows.expected_rows,
            out_dtype=self.dtype,
            backend=backend,
        )


def _backend_for(rows: ExpertRows, kind: Kind, backends: Sequence[Name]) -> Name:
    """By the mean number of rows per expert, which is known without asking the device."""
    if isinstance(rows, ContiguousRows):
        return choose(kind, "contiguous", -(-sum(rows.counts) // max(len(rows.counts), 1)), backends)
    return choose(kind, "masked", rows.hidden.shape[1] if rows.expected_rows is None else rows.expected_rows, backends)


def _quantized(rows: ExpertRows) -> ExpertRows:
    """FP8 rows with scales, rows running fastest; as they are if they have some."""
    if rows.scales is not None:
        return rows
    if isinstance(rows, ContiguousRows):
        hidden, scales = quantize_per_token(rows.hidden, mn_major_scales=True)
        return replace(rows, hidden=hidden, scales=scales)
    num_experts, room, width = rows.hidden.shape
    hidden, scales = quantize_per_token(rows.hidden.reshape(-1, width))
    scales = empty_scales(rows.hidden, mn_major=True).copy_(scales.view(num_experts, room, scales.shape[1]))
    return replace(rows, hidden=hidden.view(num_experts, room, width), scales=scales)
