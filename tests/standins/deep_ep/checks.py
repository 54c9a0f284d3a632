"""Failures in DeepEP's words: its host assertions reach Python as RuntimeError with file, line and the condition."""

from __future__ import annotations

import torch
from torch import Tensor

LEGACY, ELASTIC = "csrc/legacy/buffer.hpp", "csrc/elastic/buffer.hpp"


def host_assert(condition: bool, text: str, file: str = LEGACY) -> None:
    if not condition:
        raise RuntimeError(f"Assertion exception ({file}:1): {text}")


def check_matrix(tensor: Tensor, name: str, dtype: torch.dtype | None = None, file: str = LEGACY) -> None:
    host_assert(tensor.dim() == 2 and tensor.is_contiguous(), f"{name}.dim() == 2 and {name}.is_contiguous()", file)
    if dtype is not None:
        host_assert(tensor.dtype == dtype, f"{name}.scalar_type() == {dtype}", file)


def misuse(text: str) -> RuntimeError:
    """What the real library would not notice, but suffer from: overwritten buffers, races between streams."""
    return RuntimeError(f"deep_ep stand-in: {text}")


def poison(tensor: Tensor) -> Tensor:
    """Fill with what no test can mistake for a result."""
    if tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8).fill_(0x7F)
    elif tensor.dtype.is_floating_point:
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).min)
    return tensor


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return poison(torch.empty(*shape, dtype=dtype))
