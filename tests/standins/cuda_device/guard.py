"""Makes a CPU build of torch accept the device type "cuda": a device guard that does nothing, and the two factories of all tensors.

torch asks a guard for every device type whose tensors it indexes or copies. A CPU build has none for CUDA, but one for "meta",
which does nothing; it serves here with one function changed: the current device is the calling thread's, not "meta".
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch

CUDA, META = 1, 14
"""Numbers of c10::DeviceType."""
REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
GET_DEVICE, NUM_METHODS = 2, 32
"""Place of `getDevice` among the virtual methods, and no fewer than there are (c10/core/impl/DeviceGuardImplInterface.h)."""

_thread = threading.local()


def current_device() -> int:
    """Of the calling thread, as in CUDA: 0 until it says otherwise."""
    return getattr(_thread, "device", 0)


def set_current_device(index: int) -> None:
    _thread.device = index


@cache
def register_guard() -> tuple[Any, ...]:
    """Once per process; what it returns must stay alive."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 20).in_dll(library, REGISTRY)
    assert not registry[CUDA], "this build of torch has CUDA: it needs no stand-in"
    methods = ctypes.cast(registry[META], ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))[0]
    table = (ctypes.c_void_p * (NUM_METHODS + 2))(*[methods[index] for index in range(-2, NUM_METHODS)])
    # c10::Device is two bytes in a register: type, then index.
    get_device = ctypes.CFUNCTYPE(ctypes.c_int16, ctypes.c_void_p)(lambda self: CUDA | current_device() << 8)
    table[GET_DEVICE + 2] = ctypes.cast(get_device, ctypes.c_void_p).value
    guard = (ctypes.c_void_p * 2)(ctypes.addressof(table) + 2 * ctypes.sizeof(ctypes.c_void_p))
    registry[CUDA] = ctypes.addressof(guard)
    return table, get_device, guard
