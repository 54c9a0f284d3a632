"""RMS normalisation (Zhang and Sennrich, 2019), optionally fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.native.library import kernels_for


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H] scaled to unit root mean square over H, times weight [H]. Statistics in fp32; returns x's dtype."""
    native = kernels_for(x)
    if native is None or x.stride(1) != 1:
        return rms_norm_reference(x, weight, eps)
    rows, width = x.shape
    out = x.new_empty(rows, width)
    native.rms_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), rows, width, eps, out.data_ptr(), torch.get_num_threads())
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (norm(x + residual), x + residual), both [T, H]."""
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
