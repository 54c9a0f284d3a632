"""A rank's incoming messages. The ranks of one DP group receive the same requests in the same order, but not at the same time."""

from __future__ import annotations

import time
from collections import deque

import zmq

from moesaic.launch.engine.core import RequestMessage
from moesaic.launch.engine.messages import AbortRequest, Control, GenerateRequest, Wake, to_rank_decoder


class Inbox:
    """Reads a PULL socket without ever blocking the lockstep, but for `take`, which has a deadline."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._requests: deque[RequestMessage] = deque()
        self._controls: deque[Control] = deque()

    def receive(self) -> None:
        """Read everything that has arrived."""
        while True:
            try:
                self._sort(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return

    def wait(self, seconds: float) -> None:
        """Sleep until a message arrives, at most `seconds`."""
        if not self._requests and not self._controls:
            self._socket.poll(int(seconds * 1000))

    def requests(self) -> list[RequestMessage]:
        """All requests and aborts received so far, removed."""
        taken = list(self._requests)
        self._requests.clear()
        return taken

    def controls(self) -> list[Control]:
        """All control commands received so far, removed."""
        taken = list(self._controls)
        self._controls.clear()
        return taken

    def take(self, count: int, deadline_s: float) -> list[RequestMessage]:
        """Exactly the next `count` requests, waiting for those still on their way. Raises TimeoutError."""
        end = time.monotonic() + deadline_s
        while len(self._requests) < count:
            if not self._socket.poll(max(0, int((end - time.monotonic()) * 1000))):
                raise TimeoutError(
                    f"received {len(self._requests)} of {count} requests that the DP group's leader has, in {deadline_s} s"
                )
            self.receive()
        return [self._requests.popleft() for _ in range(count)]

    def _sort(self, frame: bytes) -> None:
        message = to_rank_decoder.decode(frame)
        if isinstance(message, GenerateRequest | AbortRequest):
            self._requests.append(message)
        elif isinstance(message, Control):
            self._controls.append(message)
        else:
            assert isinstance(message, Wake)
