"""Puts the stand-in in place for the length of a `with`, and everything back."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import interpreter  # noqa: F401  before Triton
import torch
from torch import Tensor

from . import copies, deep_ep, graphs, kernels, runtime, waits
from .guard import register_guard, set_current_device
from .tensor import DeviceTensor, execute, on_device

aten = torch.ops.aten
NO_CUDA = "Torch not compiled with CUDA enabled"
"""As torch says it, until it has been initialised."""


@dataclass(frozen=True)
class Seen:
    """What happened since the stand-in was installed."""

    @property
    def waits(self) -> list[waits.Wait]:
        return waits.waits

    def since(self, mark: int) -> list[waits.Wait]:
        """Those after the first `mark`."""
        return waits.waits[mark:]


@contextlib.contextmanager
def installed() -> Iterator[Seen]:
    """In this process, for all its threads. Not to be nested."""
    register_guard()
    _register_factories()
    waits.waits.clear()
    copies.forget()
    set_current_device(0)
    with contextlib.ExitStack() as stack:
        for name, value in {**runtime.REPLACED, "CUDAGraph": graphs.CUDAGraph, "graph": graphs.Capture}.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "Generator", runtime.Generator))
        for name in ("empty", "zeros", "tensor"):
            stack.enter_context(patch.object(torch, name, _pinning(getattr(torch, name))))
        stack.enter_context(patch.object(Tensor, "pin_memory", _pin_memory))
        stack.enter_context(patch.object(Tensor, "is_pinned", _is_pinned))
        kernels.replace()
        stack.enter_context(deep_ep.replaced())
        stack.enter_context(_active())
        stack.callback(kernels.restore)
        yield Seen()
        copies.complete()


_is_active = False


@contextlib.contextmanager
def _active() -> Iterator[None]:
    global _is_active
    assert not _is_active, "the stand-in is installed already"
    _is_active = True
    try:
        yield
    finally:
        _is_active = False


def _pinning(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory that knows `pin_memory`."""

    def make(*arguments: Any, pin_memory: bool = False, **named: Any) -> Tensor:
        made = factory(*arguments, **named)
        return copies.pin(made) if pin_memory else made

    return make


def _pin_memory(self: Tensor, *_: Any) -> Tensor:
    if isinstance(self, DeviceTensor):
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")
    return self if copies.is_pinned(self) else copies.pin(self.clone(memory_format=torch.contiguous_format))


def _is_pinned(self: Tensor, *_: Any) -> bool:
    return not isinstance(self, DeviceTensor) and copies.is_pinned(self)


SIZED_FACTORIES = [
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.randperm.default,
    aten.randperm.generator,
    aten.eye.default,
]
"""Those that torch makes empty, to be resized by the kernel that fills them: a device tensor does not learn of that."""


def _factory(function: Any) -> Callable[..., Tensor]:
    def make(*arguments: Any, device: Any = None, **named: Any) -> Tensor:
        assert _is_active, NO_CUDA
        made: Tensor = execute(function, arguments, {**named, "device": device})
        return made

    return make


@cache
def _register_factories() -> Any:
    """For as long as the process lives: without the stand-in installed torch refuses the device before it comes so far."""
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        return execute(aten.new_empty.default, (on_device(torch.empty(0)), size), _given(dtype=dtype, device=device))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        return execute(
            aten.new_empty_strided.default, (on_device(torch.empty(0)), size, stride), _given(dtype=dtype, device=device)
        )

    def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        copied: Tensor = execute(aten.copy_.default, (target, source, non_blocking), {})
        return copied

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("empty.memory_format", empty, "CUDA")
        library.impl("empty_strided", empty_strided, "CUDA")
        for function in SIZED_FACTORIES:
            library.impl(function.name().removeprefix("aten::"), _factory(function), "CUDA")
        library.impl("copy_", copy_, "CUDA")  # torch.tensor copies below the key of subclasses
    return library


def _given(*, dtype: torch.dtype | None, device: Any) -> dict[str, Any]:
    assert _is_active, NO_CUDA
    return {"dtype": dtype or torch.get_default_dtype(), "device": device}
