"""Whether the Triton kernels compute on a tensor. Knows the device and one switch; imports no Triton.

A front function that gets True imports its kernel from kernels/triton/. What the
CPU makes for a device goes there by `upload`, and what it wants to know comes back by `Download`: nothing else of a step waits.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SWITCH_VARIABLE = "MOESAIC_GPU_KERNELS"
""""torch" keeps CUDA tensors to the torch references."""


def uses_triton(x: Tensor) -> bool:
    """True for tensors on a CUDA device, unless there is a reason against it."""
    return x.is_cuda and why_missing() is None


def why_missing() -> str | None:
    """Why the torch references compute on CUDA tensors; None: the kernels do. For the resolution report."""
    if os.environ.get(SWITCH_VARIABLE) == "torch":
        return f"{SWITCH_VARIABLE}=torch"
    return None if _has_triton() else "the package triton is not installed"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def upload(values: Tensor, device: torch.device) -> Tensor:
    """CPU tensor -> the same on `device`, from pinned memory: the CPU does not wait for the device, as it does for other memory."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True) if values.numel() else values.new_empty(values.shape, device=device)


class Download:
    """Tensors on their way from a device to the CPU."""

    def __init__(self, device: torch.device, *values: Tensor) -> None:
        """Begins, and waits for nothing. `values` are on the device."""
        self._copies = values
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            from torch.cuda import Event, current_stream

            self._copies = tuple(value.to("cpu", non_blocking=True) for value in values)  # into pinned memory: torch sees to it
            self._arrived = Event()  # type: ignore[no-untyped-call]
            self._arrived.record(current_stream(device))

    def result(self) -> tuple[Tensor, ...]:
        """The copies, after one wait for all that the stream had been given when they began, and for nothing that came later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copies
