"""SwiGLU: silu(gate) * up (Shazeer, 2020)."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 * I], gate first -> [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
