"""What CUDA refuses or waits for: operations on tensors of several devices, dtypes without a kernel, results of unknown size.

Facts of torch 2.11 to 2.13 (native_functions, aten/src/ATen/native/cuda), as far as the engine meets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

WAITING = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten._local_scalar_dense.default,
}
"""The CPU needs a value from the device to go on."""

_INTEGER_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.dot, aten.addmv, aten.addbmm}
"""cuBLAS multiplies no integers, a CPU does."""
_WITHOUT_FP8 = {aten.fill_, aten.index_fill_, aten.add, aten.mul, aten.sub, aten.div, aten.mm, aten.bmm, aten.amax, aten.abs}
_TAKES_NUMBERS = {aten.fill_, aten.fill, aten.masked_fill, aten.masked_fill_, aten.index_fill_, aten.index_put_, aten.index_put}
"""Besides pointwise operations: a host tensor without dimensions is a number to them."""
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def check(function: Any, arguments: tuple[Any, ...], named: dict[str, Any], is_device: Any) -> None:
    """Raises what CUDA raises. `is_device`: the class of device tensors."""
    tensors = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, is_device)]
    _check_devices(function, tensors, on_device, is_device)
    _check_dtypes(function, on_device)


def _check_devices(function: Any, tensors: Sequence[Tensor], on_device: Sequence[Tensor], is_device: Any) -> None:
    hosts = [tensor for tensor in tensors if not isinstance(tensor, is_device)]
    takes_numbers = torch.Tag.pointwise in function.tags or function.overloadpacket in _TAKES_NUMBERS
    strays = [tensor for tensor in hosts if tensor.dim() > 0 or not takes_numbers]
    devices = {str(tensor.device) for tensor in on_device}
    if on_device and (strays or len(devices) > 1):
        found = sorted(devices | {str(tensor.device) for tensor in strays})
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(found)}! "
            f"(when checking arguments of {function})"
        )


def _check_dtypes(function: Any, on_device: Sequence[Tensor]) -> None:
    packet = function.overloadpacket
    for tensor in on_device:
        if packet in _INTEGER_PRODUCTS and not tensor.dtype.is_floating_point:
            raise RuntimeError(f'"addmm_cuda" not implemented for {tensor.dtype} ({function})')
        if packet in _WITHOUT_FP8 and tensor.dtype in _FP8:
            raise RuntimeError(f'"{packet.__name__}_cuda" not implemented for {tensor.dtype}')
