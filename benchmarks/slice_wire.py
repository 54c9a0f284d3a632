"""What stands in for the network: a transfer that happens here and is complete when the stated time has passed, not before.

A transfer copies what would arrive. On a GPU it runs on a stream of its own while a second one sleeps for the stated time, message
after message; what waits is the computation stream, and the CPU only where it is told to. On a CPU it runs at once and the rest of
the time is slept through. The sleeping kernel takes one multiprocessor's slot, not the 20 that DeepEP's normal kernels take.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

ValueT = TypeVar("ValueT")
ArrivedT_co = TypeVar("ArrivedT_co", covariant=True)

CALIBRATION_CYCLES = 50_000_000


class Message(Protocol[ArrivedT_co]):
    """A transfer under way; a `Pending` of moe/communication.py."""

    def wait(self) -> None:
        """What is computed from here on comes after the transfer."""
        ...

    def wait_on_host(self) -> None:
        """The CPU too goes on only after the transfer."""
        ...

    def when_done(self, callback: Callable[[], None]) -> None: ...

    def value(self) -> ArrivedT_co:
        """What has arrived; after `wait`."""
        ...


class Wire(Protocol):
    """Where messages are sent, one after another."""

    def send(self, transfer: Callable[[], ValueT], seconds: float) -> Message[ValueT]:
        """Begin `transfer`, after all that has been submitted to compute; it takes `seconds`, or longer if the copy does."""
        ...


class HostMessage(Generic[ValueT]):
    """Complete at `ready_at` on the clock of time.perf_counter."""

    def __init__(self, value: ValueT, ready_at: float) -> None:
        self._value = value
        self._ready_at = ready_at

    def wait(self) -> None:
        time.sleep(max(0.0, self._ready_at - time.perf_counter()))

    wait_on_host = wait

    def when_done(self, callback: Callable[[], None]) -> None:
        timer = threading.Timer(max(0.0, self._ready_at - time.perf_counter()), callback)
        timer.daemon = True
        timer.start()

    def value(self) -> ValueT:
        return self._value


class HostWire:
    """For the CPU."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def send(self, transfer: Callable[[], ValueT], seconds: float) -> HostMessage[ValueT]:
        self._free_at = max(self._free_at, time.perf_counter()) + seconds
        return HostMessage(transfer(), self._free_at)


class DeviceMessage(Generic[ValueT]):
    """Complete at an event of the copying stream."""

    def __init__(self, value: ValueT, done: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        self._value = value
        self._done = done
        self._stream = stream

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._done)

    def wait_on_host(self) -> None:
        self._done.synchronize()
        self.wait()

    def when_done(self, callback: Callable[[], None]) -> None:
        """At once, with the copying stream current: what the callback marks there, the stream reaches at completion."""
        with torch.cuda.stream(self._stream):
            callback()

    def value(self) -> ValueT:
        return self._value


class DeviceWire:
    """For one GPU. What a transfer allocates is reused by later transfers only, and each begins after all that the computation
    stream was given before it: so after the last reader.
    """

    def __init__(self, cycles_per_s: float) -> None:
        self._cycles_per_s = cycles_per_s
        self._copies, self._link = torch.cuda.Stream(), torch.cuda.Stream()

    def send(self, transfer: Callable[[], ValueT], seconds: float) -> DeviceMessage[ValueT]:
        submitted = torch.cuda.current_stream().record_event()
        self._copies.wait_event(submitted)
        if seconds > 0:
            self._link.wait_event(submitted)
            with torch.cuda.stream(self._link):
                torch.cuda._sleep(round(seconds * self._cycles_per_s))
                passed = self._link.record_event()
        with torch.cuda.stream(self._copies):
            value = transfer()
            if seconds > 0:
                self._copies.wait_event(passed)
            done = self._copies.record_event()
        return DeviceMessage(value, done, self._copies)


def sleep_cycles_per_s() -> float:
    """What torch.cuda._sleep counts in, measured on an idle GPU; its clock may be slower under load, and waits longer then."""
    torch.cuda._sleep(CALIBRATION_CYCLES)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    torch.cuda._sleep(CALIBRATION_CYCLES)
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return CALIBRATION_CYCLES / milliseconds * 1e3


def make_wire(device: torch.device) -> Wire:
    return DeviceWire(sleep_cycles_per_s()) if device.type == "cuda" else HostWire()
