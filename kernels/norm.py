"""RMS normalisation (Zhang and Sennrich, 2019), optionally fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] scaled to unit root mean square over H, times weight [H]. Statistics in fp32; returns x's dtype."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (norm(x + residual), x + residual), both [..., H]."""
    total = x + residual
    return rms_norm(total, weight, eps), total
