"""What this machine has, as plain numbers, so that the choice among backends is a pure function.

Knows no flags and no backends. torch is asked only when the device is not settled.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """`num_cores` are the cores this process may use, not the machine's.

    `cuda_missing` says why there is no CUDA device.
    """

    num_cores: int
    num_cuda_devices: int = 0
    cuda_missing: str = "torch sees no CUDA device"


def detect_hardware(device: str) -> Hardware:
    """Look around. `device` "cpu" spares the second that importing torch takes."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device == "cpu":
        return Hardware(num_cores=num_cores, cuda_missing="--device cpu")
    import torch

    if torch.version.cuda is None:
        return Hardware(num_cores=num_cores, cuda_missing=f"torch {torch.__version__} is a CPU build")
    return Hardware(num_cores=num_cores, num_cuda_devices=torch.cuda.device_count())
