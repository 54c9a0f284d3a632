"""The ports that this node will listen on (`launch/endpoints.py` says which), and whether they are free now."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.launch.config import ServerConfig
from moesaic.launch.endpoints import split_address
from moesaic.launch.preflight.findings import Finding, fail, ok


@dataclass(frozen=True, kw_only=True)
class PortUse:
    """`flag`: what chooses it."""

    purpose: str
    host: str
    port: int
    flag: str


def check_ports(config: ServerConfig, *, served: bool = True) -> Iterator[Finding]:
    """One row for each purpose. `served`: also the ports that `moesaic serve` has taken itself by the time it looks."""
    by_purpose: dict[str, list[PortUse]] = {}
    for use in ports_of(config, served=served):
        by_purpose.setdefault(use.purpose, []).append(use)
    for purpose, uses in by_purpose.items():
        yield _check(purpose, uses)


def ports_of(config: ServerConfig, *, served: bool) -> Iterator[PortUse]:
    """What this node listens on."""
    if served:
        yield PortUse(purpose="HTTP", host=config.host, port=config.port, flag="--port")
    if config.node_rank > 0:
        return
    if served and config.disaggregation_mode == "prefill":
        host = config.host if config.nnodes == 1 else "0.0.0.0"
        flag = "--disaggregation-bootstrap-port"
        yield PortUse(purpose="bootstrap", host=host, port=config.disaggregation_bootstrap_port, flag=flag)
    if config.dist_init_addr is not None:
        host, port = split_address(config.dist_init_addr)
        last = port + 2 + config.tp_size if config.nnodes > 1 else port
        for number in range(port if served or config.nnodes == 1 else port + 1, last + 1):
            yield PortUse(purpose="ranks and launchers", host=host, port=number, flag="--dist-init-addr")


def _check(purpose: str, uses: list[PortUse]) -> Finding:
    what = f"ports: {purpose}"
    ports = f"{uses[0].port}" if len(uses) == 1 else f"{uses[0].port}..{uses[-1].port}"
    for use in uses:
        reason = _why_taken(use.host, use.port)
        if reason is not None:
            return fail(
                what, f"{use.host}:{use.port}: {reason}", f"choose another {use.flag}, or end what listens there (ss -ltnp)"
            )
    return ok(what, f"{uses[0].host}:{ports} free")


def _why_taken(host: str, port: int) -> str | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: what a server that has just ended leaves behind is no obstacle. And not listening: another node on this
            # machine may be looking at the same port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None
