"""The TCP connections of this very process, to be broken under whoever uses them: as a network that drops them would."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection


def own_connections() -> dict[str, tuple[int, int]]:
    """Each established TCP connection's identity and its (descriptor, port on the other side)."""
    found: dict[str, tuple[int, int]] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            identity = os.readlink(f"/proc/self/fd/{name}")
            if not identity.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as same:
                if same.family == socket.AF_INET and same.type == socket.SOCK_STREAM:
                    found[identity] = (int(name), same.getpeername()[1])
        except OSError:  # it listens only, or has gone meanwhile
            continue
    return found


def break_connections(*, but: Collection[str] = (), but_ports: Collection[int] = ()) -> int:
    """Shut down all connections but these; returns how many there were."""
    broken = 0
    for identity, (descriptor, port) in own_connections().items():
        if identity in but or port in but_ports:
            continue
        try:
            with socket.socket(fileno=os.dup(descriptor)) as same:
                same.shutdown(socket.SHUT_RDWR)
        except OSError:  # gone meanwhile
            continue
        broken += 1
    return broken
