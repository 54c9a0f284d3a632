"""Where the processes of a server find each other: torch's rendezvous and the ZMQ endpoints.

One node: Unix sockets and the file of torch's rendezvous in a private folder, removed at the end; no port that somebody else
could take first. Several nodes: fixed ports from the PORT of `--dist-init-addr HOST:PORT`, all on node 0, so that a firewall can
be told:
  PORT          the launchers' rendezvous (`launch/rendezvous.py`)
  PORT + 1      torch.distributed of the ranks
  PORT + 2      ZMQ, from all ranks to the HTTP process
  PORT + 3 + r  ZMQ, from the HTTP process to rank r
The HTTP process binds the ZMQ endpoints and the ranks connect; rank 0 binds torch's. Knows no messages.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moesaic.launch.config import ServerConfig
from moesaic.launch.errors import ConfigError

# A Unix socket's path must fit into 107 bytes on Linux and 103 on macOS.
MAX_SOCKET_PATH_BYTES = 100


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """`to_rank[rank]` and `from_rank` are ZMQ endpoints; `dist_init_method` is `file://path` or `tcp://host:port`; `folder`
    holds the sockets.
    """

    dist_init_method: str
    to_rank: tuple[str, ...]
    from_rank: str
    folder: Path | None = None

    def remove(self) -> None:
        """Remove the sockets' folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def plan_endpoints(config: ServerConfig) -> Iterator[Endpoints]:
    """The endpoints of a server, for as long as the context lasts."""
    if config.nnodes > 1:
        assert config.dist_init_addr is not None
        yield tcp_endpoints(config.dist_init_addr, config.tp_size)
        return
    folder = _private_folder()
    endpoints = Endpoints(
        dist_init_method=f"tcp://{config.dist_init_addr}" if config.dist_init_addr else f"file://{folder}/rendezvous",
        to_rank=tuple(f"ipc://{folder}/to{rank}" for rank in range(config.tp_size)),
        from_rank=f"ipc://{folder}/from",
        folder=folder,
    )
    try:
        yield endpoints
    finally:
        endpoints.remove()


def tcp_endpoints(dist_init_addr: str, world_size: int) -> Endpoints:
    """Endpoints of a server of several nodes. ConfigError when HOST is unknown or the ports reach over 65535."""
    host, port = split_address(dist_init_addr)
    last = port + 2 + world_size
    if last > 65535:
        raise ConfigError(
            f"--dist-init-addr {dist_init_addr}: {world_size} ranks need the ports {port}..{last}, above the last "
            f"one, 65535; choose a port up to {65535 - 2 - world_size}"
        )
    try:
        ip = socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(f"--dist-init-addr {dist_init_addr}: host {host!r} is unknown: {error}") from None
    return Endpoints(
        dist_init_method=f"tcp://{host}:{port + 1}",
        to_rank=tuple(f"tcp://{ip}:{port + 3 + rank}" for rank in range(world_size)),
        from_rank=f"tcp://{ip}:{port + 2}",
    )


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT -> (host, port)."""
    host, _, port = address.rpartition(":")
    return host, int(port)


def _private_folder() -> Path:
    """Named after this process, so that a later server can remove what one that was killed has left."""
    prefix = f"moesaic-{os.getpid()}-"
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    if len(f"{folder}/to9999") > MAX_SOCKET_PATH_BYTES:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    _remove_orphans(folder.parent)
    return folder


def _remove_orphans(parent: Path) -> None:
    """Remove this user's folders of servers that are gone."""
    for folder in parent.glob("moesaic-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)  # another user's stays: the system refuses


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
