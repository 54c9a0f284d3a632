"""What `--moe-a2a-backend symm` wants: one node of CUDA devices, FP8 experts, and outputs that return in one piece.

Pure. Knows nothing of how ranks share memory (moe/symm_windows.py); that they can't is found out when they try.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from moesaic.launch.config import DeviceName, ServerConfig
from moesaic.launch.conflicts import Conflict
from moesaic.launch.hardware import Hardware

FLAG = "--moe-a2a-backend symm"
ELSE = "--moe-a2a-backend torch"


def symm_conflicts(
    config: ServerConfig, device: DeviceName, quantization: Literal["none", "fp8"], hardware: Hardware
) -> Iterator[Conflict]:
    """What stands in the way; nothing for another backend. `quantization`: as settled."""
    if config.moe_a2a_backend != "symm":
        return
    if device == "cpu":
        yield Conflict(flags=FLAG, reason="only CUDA devices write each other's memory, and the device is cpu", remedy=ELSE)
        return
    triton = dict(hardware.runners_missing).get("triton")
    if triton is not None:
        yield Conflict(flags=FLAG, reason=f"its kernels are Triton's: {triton}", remedy=ELSE)
    if config.nnodes > 1:
        yield Conflict(flags=f"{FLAG} --nnodes {config.nnodes}", reason="only the GPUs of one node reach each other", remedy=ELSE)
    if quantization != "fp8":
        yield Conflict(
            flags=f"{FLAG} --quantization {config.quantization}",
            reason="tokens travel in FP8, which only experts in FP8 take",
            remedy=f"--quantization fp8 (with an FP8 checkpoint), or {ELSE}",
        )
    if config.enable_single_batch_overlap:
        yield Conflict(
            flags=f"{FLAG} --enable-single-batch-overlap",
            reason="the exchange has one way back for a dispatch, not two halves",
            remedy=f"leave --enable-single-batch-overlap out, or {ELSE}",
        )
