"""RMS normalisation (Zhang and Sennrich, 2019), alone or with the residual addition before it and FP8 quantisation after it."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.gpu import uses_triton
from moesaic.kernels.native.library import kernels_for
from moesaic.kernels.quant import quantize_per_token_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H] scaled to unit root mean square over H, times weight [H]. Statistics in fp32; returns x's dtype."""
    if uses_triton(x):
        from moesaic.kernels.triton import norm as device

        return device.rms_norm(x, weight, eps)
    native = kernels_for(x)
    if native is None or x.stride(1) != 1:
        return rms_norm_reference(x, weight, eps)
    rows, width = x.shape
    out = x.new_empty(rows, width)
    native.rms_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), rows, width, eps, out.data_ptr(), torch.get_num_threads())
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (norm(x + residual), x + residual), both [T, H]."""
    if uses_triton(x):
        from moesaic.kernels.triton import norm as device

        return device.add_rms_norm(x, residual, weight, eps)
    native = kernels_for(x)
    if native is None or not (x.is_contiguous() and residual.is_contiguous()):
        total = x + residual
        return rms_norm_reference(total, weight, eps), total
    out, total = torch.empty_like(x), torch.empty_like(x)
    native.add_rms_norm(
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        *x.shape,
        eps,
        out.data_ptr(),
        total.data_ptr(),
        torch.get_num_threads(),
    )
    return out, total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in torch, any device and dtype."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, *, mn_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """norm(x) of x [T, H] as (fp8 [T, H], scales fp32 [T, ceil(H / 128)]), rounded once, from fp32.

    The scales' memory is as in `quant.quantize_per_token`. Raises ValueError on a device.
    """
    if uses_triton(x):
        from moesaic.kernels.triton import norm as device

        return device.rms_norm_quantize(x, weight, eps, mn_major_scales=mn_major_scales)
    return rms_norm_quantize_reference(x, weight, eps, mn_major_scales=mn_major_scales)


def rms_norm_quantize_reference(x: Tensor, weight: Tensor, eps: float, *, mn_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """The same in torch, any device and dtype."""
    return quantize_per_token_reference(rms_norm_reference(x.float(), weight.float(), eps), mn_major_scales=mn_major_scales)


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, mn_major_scales: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_quantize` of x + residual, and the sum itself in x's dtype [T, H]: (fp8, scales, sum)."""
    if uses_triton(x):
        from moesaic.kernels.triton import norm as device

        return device.add_rms_norm_quantize(x, residual, weight, eps, mn_major_scales=mn_major_scales)
    return add_rms_norm_quantize_reference(x, residual, weight, eps, mn_major_scales=mn_major_scales)


def add_rms_norm_quantize_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, mn_major_scales: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in torch, any device and dtype."""
    total = x + residual
    return (*rms_norm_quantize_reference(total, weight, eps, mn_major_scales=mn_major_scales), total)
