"""Whether the Triton kernels compute on a tensor. Knows the device and one switch; imports no Triton.

A front function that gets True imports its kernel from kernels/triton/; the import fails by name where Triton is missing. Small
tables that the CPU makes for a kernel go to its device by `upload`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SWITCH_VARIABLE = "MOESAIC_GPU_KERNELS"
""""torch" keeps CUDA tensors to the torch references."""


def uses_triton(x: Tensor) -> bool:
    """True for tensors on a CUDA device, unless the switch says otherwise."""
    return x.is_cuda and os.environ.get(SWITCH_VARIABLE) != "torch"


def upload(values: Tensor, device: torch.device) -> Tensor:
    """CPU tensor -> the same on `device`, from pinned memory: the CPU does not wait for the device."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
