"""A stand-in for a CUDA device on a CPU build of torch, for tests: the engine's CUDA path runs, and CUDA's rules are kept.

    with cuda_device.installed() as seen: ...      # "cuda" works in here, in all threads; seen.waits lists every synchronisation

What it imitates: tensors that say they are on `cuda:0` and compute on memory of the CPU (tensor.py); the errors of an operation
that mixes host and device tensors, or that CUDA lacks for a dtype (rules.py); fresh memory that holds rubbish; copies between host
and device, pinned memory, and that a copy without a wait has not happened yet when the call returns (copies.py); where the CPU
waits for the device, with the source line (waits.py); `torch.cuda` as far as the engine uses it (runtime.py); graphs that replay
the very operations that were captured, at their addresses (graphs.py); Triton's kernels, in its interpreter (kernels.py);
collectives on device tensors (tensor.py, over gloo); and DeepEP behind its own stand-in (deep_ep.py).

What it can't show: anything about speed and memory; races between streams (all streams are one timeline here, only copies to and
from the host come late); illegal addresses; the arithmetic of CUDA's own kernels, and of Triton's compiler; NCCL.
"""

from .install import Seen, installed
from .tensor import DeviceTensor
from .waits import Wait

__all__ = ["DeviceTensor", "Seen", "Wait", "installed"]
