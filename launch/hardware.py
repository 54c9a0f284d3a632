"""What this machine has, as plain numbers, so that the choice among backends is a pure function.

Knows no flags and no backends. torch is asked only where there is an NVIDIA driver.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from moesaic.kernels.gpu import SWITCH_VARIABLE as GPU_SWITCH
from moesaic.kernels.gpu import why_missing as why_gpu_kernels_missing
from moesaic.kernels.grouped_backends import NAMES, Name
from moesaic.kernels.native.build import why_missing
from moesaic.launch.config import DeviceName

NO_DEVICE = "torch sees no CUDA device"
NO_FLASHINFER = "the package flashinfer is not installed (flashinfer-python)"
NO_DRIVER = "this machine has no NVIDIA driver"
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg")
"""What a Linux machine with an NVIDIA driver has: its own device file, or Windows' under WSL."""
ASK_DEADLINE_S = 120
ASK_RUNNERS = """
import json, torch
from moesaic.kernels.grouped_backends import NAMES, unfit_reason
capability = torch.cuda.get_device_capability(0)
print(json.dumps([(name, reason) for name in NAMES if (reason := unfit_reason(name, capability))]))
"""
ASK_DEEPEP = """
import json, sys
from moesaic.moe.deepep_library import why_missing
print(json.dumps(why_missing(sys.argv[1])))
"""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """`num_cores` are the cores this process may use, not the machine's.

    `cuda_missing` says why there is no CUDA device, `cpu_kernels_missing` why there are no compiled CPU kernels (None: there are),
    `gpu_kernels_missing` why our Triton kernels can't compute on the CUDA devices, `runners_missing` why experts can't be computed
    there by this or that backend, `deepep_missing` why there is no DeepEP, if it was asked for.
    """

    num_cores: int
    num_cuda_devices: int = 0
    cuda_missing: str = NO_DEVICE
    cpu_kernels_missing: str | None = None
    gpu_kernels_missing: str | None = None
    runners_missing: tuple[tuple[Name, str], ...] = ()
    deepep_missing: str | None = None
    flashinfer_missing: str | None = NO_FLASHINFER


def detect_hardware(device: str, a2a_backend: str = "none") -> Hardware:
    """Look around, and for DeepEP if this is its backend. Without a driver, or with `device` "cpu", this spares the seconds that
    importing torch takes.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device == "cpu":
        return _without_cuda(num_cores, "--device cpu")
    if sys.platform == "linux" and not any(os.path.exists(path) for path in _DRIVER_FILES):
        return _without_cuda(num_cores, NO_DRIVER)
    import torch

    if torch.version.cuda is None:
        return _without_cuda(num_cores, f"torch {torch.__version__} is a CPU build")
    num_devices = torch.cuda.device_count()
    if not num_devices:
        return _without_cuda(num_cores, NO_DEVICE)
    return Hardware(
        num_cores=num_cores,
        num_cuda_devices=num_devices,
        gpu_kernels_missing=why_gpu_kernels_missing(),
        runners_missing=_missing_runners(),
        deepep_missing=_missing_deepep(a2a_backend),
        flashinfer_missing=None if importlib.util.find_spec("flashinfer") else NO_FLASHINFER,
    )


def _missing_deepep(backend: str) -> str | None:
    if not backend.startswith("deepep"):
        return None
    reason, failure = _ask(ASK_DEEPEP, backend)
    return reason if failure is None else f"asking for DeepEP failed: {failure}"


def _missing_runners() -> tuple[tuple[Name, str], ...]:
    if os.environ.get(GPU_SWITCH) == "torch":
        return tuple((name, f"{GPU_SWITCH}=torch") for name in NAMES if name != "torch")
    found, failure = _ask(ASK_RUNNERS)
    if failure is None:
        return tuple((name, reason) for name, reason in found)
    return tuple((name, f"asking for it failed: {failure}") for name in NAMES if name != "torch")


def _ask(code: str, *arguments: str) -> tuple[Any, str | None]:
    """What a process of its own prints as JSON in its last line, and why it came to nothing (None: it didn't).

    To import these libraries is to set up CUDA, which this process leaves to the ranks.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, timeout=ASK_DEADLINE_S, check=True
        )
        return json.loads(done.stdout.splitlines()[-1]), None
    except subprocess.CalledProcessError as error:
        return None, "".join(error.stderr.strip().splitlines()[-1:])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return None, str(error)


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
