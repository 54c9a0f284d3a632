"""Whether the Triton kernels compute on a tensor. Knows the device and one switch; imports no Triton.

A front function that gets True imports its kernel from kernels/triton/; the import fails by name where Triton is missing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SWITCH_VARIABLE = "MOESAIC_GPU_KERNELS"
""""torch" keeps CUDA tensors to the torch references."""


def uses_triton(x: Tensor) -> bool:
    """True for tensors on a CUDA device, unless the switch says otherwise."""
    return x.is_cuda and os.environ.get(SWITCH_VARIABLE) != "torch"
