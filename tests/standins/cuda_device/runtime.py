"""`torch.cuda` as far as the engine and the benchmarks use it. One timeline stands for all streams; events know the real time.

The current device belongs to a thread, as in CUDA.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from . import copies, waits
from .guard import current_device, set_current_device

NUM_DEVICES = 8
TOTAL_BYTES, FREE_BYTES = 8 << 30, 7 << 30
_thread = threading.local()


def index_of(device: Any) -> int:
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    assert device.type == "cuda", f"torch.cuda was asked about {device}"
    return current_device() if device.index is None else int(device.index)


def set_device(device: Any) -> None:
    index = index_of(device)
    if not 0 <= index < NUM_DEVICES:
        raise torch.AcceleratorError(f"CUDA error: invalid device ordinal ({index})")
    set_current_device(index)


class Event:
    """See torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._timed = enable_timing
        self._at: float | None = None
        self._copies = 0

    def record(self, stream: Stream | None = None) -> None:
        self._at, self._copies = time.perf_counter(), copies.num_begun()

    def synchronize(self) -> None:
        waits.wait("event", until=self._copies)

    def query(self) -> bool:
        return True

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        if not (self._timed and end._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        assert self._at is not None and end._at is not None, "both events must be recorded"
        return max((end._at - self._at) * 1e3, 1e-6)


class Stream:
    """See torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device_index = index_of(device)
        self.device = torch.device("cuda", self.device_index)
        self.cuda_stream = id(self)

    def synchronize(self) -> None:
        waits.wait("stream")

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream), f"{stream!r} is no stream"

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event), f"{event!r} is no event"

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        return True


_default_streams = [Stream(index) for index in range(NUM_DEVICES)]


def current_stream(device: Any = None) -> Stream:
    index = index_of(device)
    return getattr(_thread, "streams", {}).get(index, _default_streams[index])


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    before = dict(getattr(_thread, "streams", {}))
    _thread.streams = {**before, stream.device_index: stream}
    try:
        yield
    finally:
        _thread.streams = before


@contextlib.contextmanager
def device(device: Any) -> Iterator[None]:
    before = current_device()
    set_device(device)
    try:
        yield
    finally:
        set_current_device(before)


def synchronize(device: Any = None) -> None:
    index_of(device)
    waits.wait("device")


class Generator(torch.Generator):
    """A generator of the device: draws as the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != "cuda":
            return REAL_GENERATOR(device)
        made = REAL_GENERATOR.__new__(cls)
        made._index = index_of(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self._index)  # type: ignore[attr-defined]


REAL_GENERATOR = torch.Generator


def properties(device: Any = None) -> SimpleNamespace:
    """Of a Hopper GPU with few multiprocessors, so that persistent kernels are short in the interpreter."""
    index_of(device)
    return SimpleNamespace(
        name="device stand-in",
        multi_processor_count=3,
        total_memory=TOTAL_BYTES,
        major=9,
        minor=0,
        warp_size=32,
        L2_cache_size=1 << 20,
    )


class _Runtime:
    """What `torch.cuda.cudart()` gives."""

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        copies.pin_range(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        return 0


def check_error(code: int) -> None:
    assert code == 0, f"CUDA error {code}"


REPLACED: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: NUM_DEVICES,
    "current_device": current_device,
    "set_device": set_device,
    "device": device,
    "Event": Event,
    "Stream": Stream,
    "stream": stream,
    "current_stream": current_stream,
    "default_stream": lambda device=None: _default_streams[index_of(device)],
    "synchronize": synchronize,
    "get_device_properties": properties,
    "get_device_name": lambda device=None: properties(device).name,
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (FREE_BYTES, TOTAL_BYTES),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "graph_pool_handle": lambda: (0, 1),
    "cudart": _Runtime,
    "check_error": check_error,
    "_sleep": lambda cycles: None,
}
"""Attributes of torch.cuda; graphs are install.py's to add."""
