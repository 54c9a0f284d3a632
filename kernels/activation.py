"""SwiGLU: silu(gate) * up (Shazeer, 2020), alone and fused with the FP8 quantisation of its result."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.checks import FLOATS, INDICES, check_tensor
from moesaic.kernels.gpu import uses_triton
from moesaic.kernels.native.library import kernels_for
from moesaic.kernels.quant import empty_scales, quantize_per_token_reference


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 * I], gate first -> [..., I]."""
    if uses_triton(gate_up):
        from moesaic.kernels.triton import activation as device

        return device.swiglu(gate_up)
    native = kernels_for(gate_up)
    if native is None or not gate_up.is_contiguous():
        return swiglu_reference(gate_up)
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if width:
        native.swiglu(gate_up.data_ptr(), out.numel() // width, width, out.data_ptr(), torch.get_num_threads())
    return out


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The same in torch, any device and dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_quantize(gate_up: Tensor, *, row_expert: Tensor | None = None, mn_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """gate_up [M, 2 * I] -> (fp8 [M, I], scales fp32 [M, ceil(I / 128)]), rounded once, from fp32.

    Rows with `row_expert` [M] -1 are padding: their values and scales are unspecified. The scales' memory is as in
    `quant.quantize_per_token`. Raises ValueError.
    """
    if uses_triton(gate_up):
        from moesaic.kernels.triton import activation as device

        return device.swiglu_quantize(gate_up, row_expert=row_expert, mn_major_scales=mn_major_scales)
    return swiglu_quantize_reference(gate_up, row_expert=row_expert, mn_major_scales=mn_major_scales)


def swiglu_quantize_reference(
    gate_up: Tensor, *, row_expert: Tensor | None = None, mn_major_scales: bool = False
) -> tuple[Tensor, Tensor]:
    """The same in torch, any device; computes the padding rows too."""
    check_fused(gate_up, row_expert)
    return quantize_per_token_reference(swiglu_reference(gate_up.float()), mn_major_scales=mn_major_scales)


def swiglu_quantize_masked(gate_up: Tensor, counts: Tensor, *, mn_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """gate_up [E, M, 2 * I], the first counts [E] rows of each expert valid -> (fp8 [E, M, I], scales fp32 [E, M, ceil(I / 128)]).

    Invalid rows are unspecified. The counts stay on the device. Raises ValueError.
    """
    if uses_triton(gate_up):
        from moesaic.kernels.triton import activation as device

        return device.swiglu_quantize_masked(gate_up, counts, mn_major_scales=mn_major_scales)
    return swiglu_quantize_masked_reference(gate_up, counts, mn_major_scales=mn_major_scales)


def swiglu_quantize_masked_reference(gate_up: Tensor, counts: Tensor, *, mn_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """The same in torch, any device; computes the invalid rows too."""
    check_fused_masked(gate_up, counts)
    num_experts, num_rows, both = gate_up.shape
    quantized, scales = quantize_per_token_reference(swiglu_reference(gate_up.float()).view(-1, both // 2))
    quantized = quantized.view(num_experts, num_rows, both // 2)
    return quantized, empty_scales(quantized, mn_major=mn_major_scales).copy_(scales.view(num_experts, num_rows, scales.shape[1]))


def check_fused(gate_up: Tensor, row_expert: Tensor | None) -> None:
    """What `swiglu_quantize` refuses. Raises ValueError."""
    check_tensor("swiglu_quantize", "gate_up", gate_up, shape=(None, None), dtypes=FLOATS, contiguous=True)
    _check_even("swiglu_quantize", gate_up)
    if row_expert is not None:
        check_tensor("swiglu_quantize", "row_expert", row_expert, shape=gate_up.shape[:1], dtypes=INDICES, like=gate_up)


def check_fused_masked(gate_up: Tensor, counts: Tensor) -> None:
    """What `swiglu_quantize_masked` refuses. Raises ValueError."""
    check_tensor("swiglu_quantize_masked", "gate_up", gate_up, shape=(None, None, None), dtypes=FLOATS, contiguous=True)
    _check_even("swiglu_quantize_masked", gate_up)
    check_tensor("swiglu_quantize_masked", "counts", counts, shape=gate_up.shape[:1], dtypes=INDICES, like=gate_up)


def _check_even(function: str, gate_up: Tensor) -> None:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{function}: gate_up has {gate_up.shape[-1]} columns, wanted an even number: gate and up side by side")
