"""Copies between host and device, and pinned memory.

A copy without a wait happens when the CPU next waits: until then what goes to the host holds rubbish there, and what comes from the
host must not change there (torch keeps it alive). From pageable memory CUDA may wait whatever it is told, which counts as a wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import waits

_under_way: list[Callable[[], None]] = []
_num_begun = 0
_lock = threading.RLock()
_pinned: dict[int, Any] = {}
"""Storages by address, kept so that no other memory gets the address."""


class ChangedTooEarly(AssertionError):  # noqa: N818  reads as what happened
    """The host wrote to memory that a copy to the device had yet to read."""


def pin(tensor: Tensor) -> Tensor:
    """A host tensor's memory counts as pinned from now on."""
    storage = tensor.untyped_storage()
    _pinned[storage.data_ptr()] = storage
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in _pinned


def pin_range(address: int) -> None:
    """cudaHostRegister: the memory lives as long as whoever registers it says."""
    _pinned.setdefault(address, None)


def forget() -> None:
    """No copy is under way and nothing is pinned."""
    _under_way.clear()
    _pinned.clear()


def num_begun() -> int:
    """A mark for `complete`: the copies before it."""
    return _num_begun


def complete(until: int | None = None) -> None:
    """All copies that were begun, or those before the mark, happen now. Raises ChangedTooEarly."""
    with _lock:
        first = _num_begun - len(_under_way)
        count = len(_under_way) if until is None else max(0, until - first)
        ready = _under_way[:count]
        del _under_way[:count]
    for each in ready:
        each()


def to_device(target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
    """Both in host memory here; `target` is a device tensor's."""
    target.copy_(source)
    if not non_blocking:
        waits.wait("blocking copy to the device")
    elif not is_pinned(source):
        waits.wait("copy from pageable memory to the device")
    else:
        before = source.clone()

        def check() -> None:
            if not torch.equal(_bytes(source), _bytes(before)):
                raise ChangedTooEarly("the source of a copy to the device was changed before anything waited for the copy")

        _begin(check)


def to_host(target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
    """Both in host memory here; `source` is a device tensor's."""
    if not non_blocking or not is_pinned(target):
        target.copy_(source)
        waits.wait("blocking copy to the host")
        return
    value = source.to(target.dtype, copy=True)
    spoil(target)
    _begin(lambda: target.copy_(value))


@torch.inference_mode()
def spoil(tensor: Tensor) -> Tensor:
    """Rubbish: NaN, or the least of integers; the memory of a fresh tensor, or of one that a copy has yet to fill."""
    if tensor.dtype.is_complex or (tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1):
        return tensor.fill_(float("nan"))
    if tensor.dtype is torch.bool:
        return tensor.fill_(True)
    if tensor.dtype.itemsize == 1:
        tensor.view(torch.uint8).fill_(0x7F)
        return tensor
    return tensor.fill_(torch.iinfo(tensor.dtype).min)


def _begin(end: Callable[[], Any]) -> None:
    global _num_begun
    with _lock:
        _under_way.append(end)
        _num_begun += 1


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


waits.complete_copies = complete
