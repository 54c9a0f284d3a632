"""How a Triton kernel is started, or only written down, so that it can be compiled where there is no GPU.

Every host function of this folder starts its kernels through `launch`. Inside `recorded()` nothing runs: the launches are
collected with the very arguments a GPU would get (meta tensors will do), and compile.py compiles exactly those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

HOPPER_PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200 SXM: what is assumed of a device that isn't there."""
INTERPRETED_PROCESSORS = 3
"""Programs of a persistent kernel in the interpreter: few, and not a divisor of everything."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel with all its arguments, constants and options."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_recording: ContextVar[list[Launch] | None] = ContextVar("moesaic_recording", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 3, **arguments: Any) -> None:
    """Start `kernel` on the current stream; an empty grid starts nothing."""
    launches = _recording.get()
    if launches is not None:
        launches.append(Launch(kernel=kernel, arguments=arguments, num_warps=num_warps, num_stages=num_stages))
    elif all(grid):
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects the launches made inside instead of making them."""
    launches: list[Launch] = []
    token = _recording.set(launches)
    try:
        yield launches
    finally:
        _recording.reset(token)


def num_processors(device: torch.device) -> int:
    """How many programs fill the device when each has a multiprocessor to itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return HOPPER_PROCESSORS if device.type == "meta" else INTERPRETED_PROCESSORS


def ceil_div(size: int, step: int) -> int:
    return -(-size // step)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not less than size (1 for 0)."""
    return 1 << max(size - 1, 0).bit_length()
