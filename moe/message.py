"""A library's or a kernel's message between ranks as a `Pending` communication: no collective of torch's, whose handle would tell.

Whoever waits receives it. Others are told that it has come when it was received; on a device, if it came on a stream of the
library's, when it arrived there. A message without such a stream (the low-latency ones, whose receiving kernel runs in the stream
that computes) thus lasts until it is received, however long it has been there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

Wait = Callable[[], None]


class Message:
    """`receive`: called once, by whoever waits. `arrived`: puts the current stream behind the arrival, if that is known by itself;
    `receive` may set it.
    """

    def __init__(self, receive: Wait, device: torch.device, arrived: Wait | None = None) -> None:
        self.arrived = arrived
        self._receive: Wait | None = receive
        self._device = device
        self._callbacks: list[Callable[[], None]] = []

    def wait(self) -> None:
        """Raises what receiving raises; then nobody is told."""
        receive, self._receive = self._receive, None  # it may hold this message, and with it the tensors of the exchange
        assert receive is not None, "a message is received once"
        receive()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._tell(callback)

    def when_done(self, callback: Callable[[], None]) -> None:
        """As `Pending.when_done`, before anybody waits. On a device the stream current in the callback is behind the arrival."""
        if self.arrived is not None and self._device.type == "cuda":
            self._tell(callback)
        else:
            self._callbacks.append(callback)

    def _tell(self, callback: Callable[[], None]) -> None:
        with behind(self.arrived, self._device):
            callback()


@contextlib.contextmanager
def behind(event: Wait | None, device: torch.device) -> Iterator[None]:
    """On a CUDA device: with a stream current that does nothing but wait for `event`, so that a mark in it tells when that was."""
    if event is None or device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        event()
        yield
