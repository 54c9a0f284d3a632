"""Expert runners: the two grouped products and the activation between them, for both receive layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from moesaic.kernels.activation import swiglu
from moesaic.kernels.grouped_gemm import grouped_gemm_contiguous, grouped_gemm_masked
from moesaic.kernels.quant import dequantize_per_token, round_to_fp8
from moesaic.moe.dispatcher import ContiguousRows, ExpertRows


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """Routed experts of one rank: gate_up [E_local, 2 * I, H] (gate first), down [E_local, H, I].

    With scales, fp32 [E_local, rows / 128, columns / 128] of 128x128 blocks, the weights are e4m3.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None = None
    down_scales: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that an expert consists of; its part is one slice of each."""
        return tuple(tensor for tensor in (self.gate_up, self.down, self.gate_up_scales, self.down_scales) if tensor is not None)


class ExpertRunner(Protocol):
    """Computes down(swiglu(gate_up(x))) for every row with its expert's weights."""

    @property
    def inner_size(self) -> int:
        """Width of the rows between the two products, I."""
        ...

    def run(self, rows: ExpertRows) -> Tensor:
        """The outputs in the layout of `rows.hidden`: `down(gate_up(rows))`."""
        ...

    def gate_up(self, rows: ExpertRows) -> ExpertRows:
        """swiglu(gate_up(x)), rows of width I in the same layout."""
        ...

    def down(self, inner: ExpertRows) -> Tensor:
        """The outputs for rows of width I, in the layout of `inner.hidden`."""
        ...


class TorchExpertRunner:
    """Torch, and C on the CPU. With `fp8_activations`, rows are rounded to FP8 per 1x128 before each product, as W8A8 kernels do.

    Rows that a dispatch has quantised are dequantised; they need no rounding.
    """

    def __init__(self, weights: ExpertWeights, *, fp8_activations: bool = False) -> None:
        self._weights = weights
        self._fp8_activations = fp8_activations

    @property
    def inner_size(self) -> int:
        return self._weights.down.shape[2]

    def run(self, rows: ExpertRows) -> Tensor:
        return _on_filled(rows, lambda filled: self._down(self._gate_up(filled)))

    def gate_up(self, rows: ExpertRows) -> ExpertRows:
        return replace(rows, hidden=_on_filled(rows, lambda filled: self._gate_up(filled).hidden), scales=None)

    def down(self, inner: ExpertRows) -> Tensor:
        return _on_filled(inner, self._down)

    def _gate_up(self, rows: ExpertRows) -> ExpertRows:
        return replace(rows, hidden=swiglu(self._product(rows, self._weights.gate_up)), scales=None)

    def _down(self, inner: ExpertRows) -> Tensor:
        return self._product(inner, self._weights.down)

    def _product(self, rows: ExpertRows, weight: Tensor) -> Tensor:
        x = self._values(rows)
        if isinstance(rows, ContiguousRows):
            return grouped_gemm_contiguous(x, weight, rows.counts, backend="torch")
        return grouped_gemm_masked(x, weight, rows.counts, backend="torch")

    def _values(self, rows: ExpertRows) -> Tensor:
        if rows.scales is not None:
            flat, scales = (each.reshape(-1, each.shape[-1]) for each in (rows.hidden, rows.scales))
            return dequantize_per_token(flat, scales, self._weights.down.dtype).view(rows.hidden.shape)
        return round_to_fp8(rows.hidden) if self._fp8_activations else rows.hidden


def _on_filled(rows: ExpertRows, compute: Callable[[ExpertRows], Tensor]) -> Tensor:
    """On a CPU only the valid rows of a masked block, as contiguous ones: it may look at the counts, a captured graph may not."""
    if isinstance(rows, ContiguousRows) or rows.hidden.device.type != "cpu":
        return compute(rows)
    num_experts, room, width = rows.hidden.shape
    valid = torch.arange(room) < rows.counts.unsqueeze(1)
    index = valid.flatten().nonzero().squeeze(1)
    hidden = rows.hidden.reshape(-1, width).index_select(0, index)
    scales = None if rows.scales is None else rows.scales.reshape(-1, rows.scales.shape[2]).index_select(0, index)
    outputs = compute(ContiguousRows(hidden=hidden, counts=rows.counts.tolist(), scales=scales))
    filled = outputs.new_zeros(num_experts * room, outputs.shape[1]).index_copy_(0, index, outputs)
    return filled.view(num_experts, room, outputs.shape[1])
