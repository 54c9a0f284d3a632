"""Triton's kernels on device tensors, in the interpreter: pointers must be those of the thread's current device."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from . import graphs
from .guard import current_device
from .tensor import DeviceTensor

_call = interpreter.GridExecutor.__call__


def _inner(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return TensorDescriptor(_inner(value.base), value.shape, value.strides, value.block_shape, value.padding)
    if isinstance(value, DeviceTensor):
        if value.device.index != current_device():
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument: a tensor on {value.device}, current is {current_device()}")
        return value.inner
    if isinstance(value, torch.Tensor):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    return value


def _call_on_device(self: Any, *arguments: Any, **named: Any) -> Any:
    values = [value.base if isinstance(value, TensorDescriptor) else value for value in (*arguments, *named.values())]
    if not any(isinstance(value, DeviceTensor) for value in values):
        return _call(self, *arguments, **named)
    plain, plain_named = [_inner(value) for value in arguments], {name: _inner(value) for name, value in named.items()}

    def run() -> None:
        _call(self, *plain, **plain_named)

    if graphs.is_capturing():
        graphs.add(run)
    run()  # also in a capture: what follows may index with what this gives, and rubbish is no index
    return None


def replace() -> None:
    interpreter.GridExecutor.__call__ = _call_on_device


def restore() -> None:
    interpreter.GridExecutor.__call__ = _call
