"""What this machine has, as plain numbers, so that the choice among backends is a pure function.

Knows no flags and no backends. torch is asked only where there is an NVIDIA driver.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass

from moesaic.kernels.native.build import why_missing
from moesaic.launch.config import DeviceName

NO_DEVICE = "torch sees no CUDA device"
NO_DRIVER = "this machine has no NVIDIA driver"
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg")
"""What a Linux machine with an NVIDIA driver has: its own device file, or Windows' under WSL."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """`num_cores` are the cores this process may use, not the machine's.

    `cuda_missing` says why there is no CUDA device, `cpu_kernels_missing` why there are no compiled CPU kernels (None: there are).
    """

    num_cores: int
    num_cuda_devices: int = 0
    cuda_missing: str = NO_DEVICE
    cpu_kernels_missing: str | None = None


def detect_hardware(device: str) -> Hardware:
    """Look around. Without a driver, or with `device` "cpu", this spares the seconds that importing torch takes."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device == "cpu":
        return _without_cuda(num_cores, "--device cpu")
    if sys.platform == "linux" and not any(os.path.exists(path) for path in _DRIVER_FILES):
        return _without_cuda(num_cores, NO_DRIVER)
    import torch

    if torch.version.cuda is None:
        return _without_cuda(num_cores, f"torch {torch.__version__} is a CPU build")
    num_devices = torch.cuda.device_count()
    return Hardware(num_cores=num_cores, num_cuda_devices=num_devices) if num_devices else _without_cuda(num_cores, NO_DEVICE)


def machine_name(device: DeviceName, threads_per_rank: int, num_ranks: int) -> str:
    """What timings were measured on, in words, such as "2 ranks x 1 thread of AMD EPYC" or "8 x NVIDIA H200"."""
    if device == "cuda":
        import torch

        return f"{num_ranks} x {torch.cuda.get_device_name(0)}"
    ranks = f"{num_ranks} rank" + "s" * (num_ranks > 1)
    return f"{ranks} x {threads_per_rank} thread" + "s" * (threads_per_rank > 1) + f" of {_processor_name()}"


def _processor_name() -> str:
    """As Linux names it; elsewhere the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _without_cuda(num_cores: int, reason: str) -> Hardware:
    return Hardware(num_cores=num_cores, cuda_missing=reason, cpu_kernels_missing=why_missing())
