"""What the tests of Triton kernels share: where they run, and how outputs are poisoned and runs repeated.

Import it before anything that imports Triton. Where there is a GPU the kernels run on it (marker `gpu`), else in the interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import interpreter
import pytest
import torch
from torch import Tensor

on_each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="interpreter", marks=pytest.mark.skipif(not interpreter.AVAILABLE, reason="there is a GPU")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(interpreter.AVAILABLE, reason="needs a GPU")]),
    ],
)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
STEP = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Relative distance of neighbouring numbers, for tolerances."""


def random(*shape: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers; the same ones on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN and of the largest integers."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def twice(call: Callable[[], Any]) -> Any:
    """The result of `call` on poisoned memory, after checking that a second run gives the very same bits."""
    with poisoned():
        first, second = call(), call()
    for one, other in zip(_tensors(first), _tensors(second), strict=True):
        assert one.stride() == other.stride()
        assert same_bits(one, other), "two runs differ"
    return first


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_close(got: Tensor, exact: Tensor, *, absolute: float = 1e-6) -> None:
    """Equal up to a rounding to got's dtype; `exact` is float64."""
    torch.testing.assert_close(got.double().cpu(), exact.double().cpu(), rtol=2 * STEP[got.dtype], atol=absolute)


def assert_quantized(quantized: Tensor, scales: Tensor, exact: Tensor) -> None:
    """fp8 [T, K] with scales [T, ceil(K / 128)] is exact [T, K] float64 within half a step of e4m3 and a little of fp32."""
    spread = scales.double().repeat_interleave(128, 1)[:, : exact.shape[1]].cpu()
    bound = torch.maximum(exact.abs().cpu() * 2**-4, spread * 2**-10) * (1 + 1e-4)
    error = (quantized.double().cpu() * spread - exact.cpu()).abs()
    assert (error <= bound).all(), f"off by {(error - bound).max()} more than half a step"
    padded = torch.nn.functional.pad(exact.cpu(), (0, -exact.shape[1] % 128))
    peaks = padded.view(len(exact), padded.shape[1] // 128, 128).abs().amax(-1)
    torch.testing.assert_close(scales.double().cpu(), peaks.clamp(min=1e-4) / 448, rtol=1e-4, atol=0)
