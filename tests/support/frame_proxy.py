"""A broken network device: it passes a control connection's frames on, and damages one that announces pages."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Literal, Self

from moesaic.launch.disaggregation.frames import HEADER_BYTES
from moesaic.launch.disaggregation.protocol import Pages, to_decode_decoder
from moesaic.launch.disaggregation.tcp_wire import WireError, fill

Damage = Literal["repeat", "cut", "change"]
DAMAGES: tuple[Damage, ...] = ("repeat", "cut", "change")


class FrameProxy:
    """Between decode ranks and the prefill rank at `target`. `damage`: what becomes of the next frame with pages; then nothing."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.damage: Damage | None = None
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5.0)
        for one in (self._listener, *self._sockets):
            one.close()

    def _run(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                decode, _ = self._listener.accept()
                prefill = socket.create_connection(self._target)
                self._sockets += [decode, prefill]
                self._run(self._pass_on, decode, prefill)
                self._run(self._pass_frames, prefill, decode)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        _end(source, target)

    def _pass_frames(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError, WireError):
            while True:
                header = bytearray(HEADER_BYTES)
                fill(source, memoryview(header))
                payload = bytearray(struct.unpack_from("<4xI", header)[0])
                fill(source, memoryview(payload))
                damage = self.damage if isinstance(to_decode_decoder.decode(bytes(payload)), Pages) else None
                target.sendall(_damaged(bytes(header + payload), damage))
                if damage is not None:
                    self.damage = None
                if damage == "cut":
                    break
        _end(source, target)


def _damaged(frame: bytes, damage: Damage | None) -> bytes:
    return {None: frame, "repeat": 2 * frame, "cut": frame[:-3], "change": frame[:-1] + bytes([frame[-1] ^ 1])}[damage]


def _end(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
