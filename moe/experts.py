"""Expert runners: the two grouped products and the activation between them, for both receive layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moesaic.kernels.activation import swiglu
from moesaic.kernels.grouped_gemm import grouped_gemm_contiguous, grouped_gemm_masked
from moesaic.kernels.quant import round_to_fp8
from moesaic.moe.dispatcher import ContiguousRows, ExpertRows, MaskedRows


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """Routed experts of one rank: gate_up [E_local, 2 * I, H] (gate first), down [E_local, H, I]."""

    gate_up: Tensor
    down: Tensor


class ExpertRunner(Protocol):
    """Computes down(swiglu(gate_up(x))) for every row with its expert's weights."""

    def run(self, rows: ExpertRows) -> Tensor:
        """Returns the outputs in the layout of `rows.hidden`."""
        ...


class TorchExpertRunner:
    """Runs on any device. With `fp8_activations`, rows are rounded to FP8 per 1x128 before each product, as W8A8 kernels do."""

    def __init__(self, weights: ExpertWeights, *, fp8_activations: bool = False) -> None:
        self._weights = weights
        self._fp8_activations = fp8_activations

    def run(self, rows: ExpertRows) -> Tensor:
        if isinstance(rows, MaskedRows) and rows.hidden.device.type == "cpu":
            return self._run_filled(rows)
        return self._run(rows)

    def _run_filled(self, rows: MaskedRows) -> Tensor:
        """Only the valid rows, as contiguous ones: a CPU may look at the counts, a captured graph may not."""
        num_experts, room, width = rows.hidden.shape
        valid = torch.arange(room) < rows.counts.unsqueeze(1)
        index = valid.flatten().nonzero().squeeze(1)
        hidden = rows.hidden.reshape(-1, width).index_select(0, index)
        outputs = self._run(ContiguousRows(hidden=hidden, counts=rows.counts.tolist()))
        return hidden.new_zeros(num_experts * room, width).index_copy_(0, index, outputs).view_as(rows.hidden)

    def _run(self, rows: ExpertRows) -> Tensor:
        inner = swiglu(self._product(rows, rows.hidden, self._weights.gate_up))
        return self._product(rows, inner, self._weights.down)

    def _product(self, rows: ExpertRows, x: Tensor, weight: Tensor) -> Tensor:
        if self._fp8_activations:
            x = round_to_fp8(x)
        if isinstance(rows, ContiguousRows):
            return grouped_gemm_contiguous(x, weight, rows.counts)
        return grouped_gemm_masked(x, weight, rows.counts)


def make_expert_runner(name: str, weights: ExpertWeights, *, fp8_activations: bool) -> ExpertRunner:
    """Runner by flag value. Raises ValueError for a name that isn't built."""
    if name == "torch":
        return TorchExpertRunner(weights, fp8_activations=fp8_activations)
    raise ValueError(f"expert runner {name!r} is not built; choose 'torch'")
