"""SwiGLU: silu(gate) * up (Shazeer, 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.native.library import kernels_for


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 * I], gate first -> [..., I]."""
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
