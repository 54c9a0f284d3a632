"""DeepEP's stand-in behind device tensors: what goes in must be on the device, what comes out is, and graphs capture the calls.

Late results stay late: until a hook is called or an event waited for, the stand-in's rubbish is what a device tensor shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import deep_ep
from torch import Tensor

from . import graphs, waits
from .tensor import DeviceTensor, on_device

METHODS = ("get_dispatch_layout", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine")
FILLING = ("low_latency_query_mask_buffer", "clean_low_latency_buffer")
"""Methods that return nothing."""


class DeviceEvent(deep_ep.EventOverlap):
    """An event whose wait a graph captures. `again`: what a replay does instead."""

    def __init__(self, event: deep_ep.EventOverlap, again: Callable[[], None]) -> None:
        super().__init__(event.event, event.extra_tensors)
        self._again = again

    def current_stream_wait(self, release_handle: bool = False) -> None:
        super().current_stream_wait(release_handle)
        if graphs.is_capturing():
            graphs.add(self._again)


class _Call:
    """A call, its tensors, and what a replay makes of it."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self.first = self._last = run()
        self._tensors = _tensors(self.first)

    def again(self) -> None:
        self._last = self._run()
        self._fill()

    def _fill(self) -> None:
        for target, value in zip(self._tensors, _tensors(self._last), strict=True):
            target.copy_(value)

    def received(self, place: int) -> Any:
        """In place of result number `place`, a hook or an event."""
        original = self.first[place]

        def again() -> None:
            late = self._last[place]
            (late if callable(late) else late.current_stream_wait)()
            self._fill()

        if isinstance(original, deep_ep.EventOverlap):
            return original if original.event is None else DeviceEvent(original, again)

        def hook() -> None:
            original()
            if graphs.is_capturing():
                graphs.add(again)

        return hook


def _method(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        for tensor in _tensors([*arguments, *named.values()]):
            if not isinstance(tensor, DeviceTensor):
                raise RuntimeError(f"deep_ep.{name}: a tensor on {tensor.device}, wanted one on the device")
        plain = [_crossed(value, _off) for value in arguments]
        plain_named = {key: _crossed(value, _off) for key, value in named.items()}
        if name == "dispatch" and named.get("do_cpu_sync") is not False:
            waits.wait("deep_ep dispatch")
        made = _Call(lambda: method(self, *plain, **plain_named))
        if graphs.is_capturing():
            graphs.add(made.again)
        if not isinstance(made.first, tuple):
            return made.first
        return tuple(
            made.received(place) if isinstance(value, deep_ep.EventOverlap) or callable(value) else _crossed(value, on_device)
            for place, value in enumerate(made.first)
        )

    return call


def _off(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, DeviceTensor) else tensor


def _crossed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with all its tensors changed; handles of both generations included."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_crossed(each, change) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _crossed(getattr(value, field.name), change) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _crossed(value, note)
    return found


@contextlib.contextmanager
def replaced() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for library_class in (deep_ep.Buffer, deep_ep.ElasticBuffer):
            for name in (*METHODS, *FILLING):
                if hasattr(library_class, name):
                    stack.enter_context(patch.object(library_class, name, _method(name, getattr(library_class, name))))
        yield
