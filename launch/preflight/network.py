"""The networks of this node: the interface towards node 0, what its own name means, RDMA devices and what they need.

Reads /sys, /proc and the environment; sends nothing. Other nodes are `exchange.py`'s business.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from moesaic.launch.endpoints import split_address
from moesaic.launch.preflight.findings import NOT_HERE, Finding, fail, ok, warn

SIOCGIFADDR = 0x8915
DRIVER_PARAMS = Path("/proc/driver/nvidia/params")


def local_address(towards: str) -> str:
    """This machine's address from which `towards` (HOST:PORT) is reached. Sends nothing. Raises OSError for an unknown host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(split_address(towards))
        return str(probe.getsockname()[0])


def interfaces() -> dict[str, str]:
    """Interface -> its IPv4 address, on Linux; those without one are left out."""
    try:
        import fcntl
    except ImportError:
        return {}
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
    return found


def check_interface(towards: str, addresses: Mapping[str, str], environment: Mapping[str, str]) -> Finding:
    """Which interface leads to node 0, and whether gloo and NCCL are told of one that exists."""
    what = "interface towards node 0"
    try:
        address = local_address(towards)
    except OSError as error:
        return fail(what, f"{towards}: {error}", "check --dist-init-addr and this node's DNS or /etc/hosts")
    names = [name for name, own in addresses.items() if own == address]
    found = f"{names[0] if names else 'unnamed'} ({address})"
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL takes prefixes, several, "=" for exact and "^" for all but; gloo takes names.
        asked = environment.get(variable, "").removeprefix("=")
        if asked and not asked.startswith("^") and not any(name.startswith(tuple(asked.split(","))) for name in addresses):
            remedy = f"set {variable} to one of {', '.join(sorted(addresses))}, or leave it out"
            return fail(what, f"{found}; {variable}={asked} is no interface here", remedy)
    return ok(what, found)


def check_interfaces(root: Path, addresses: Mapping[str, str]) -> Finding:
    """All interfaces under `root` (/sys/class/net) that are up and have an address, so that the fast one can be named."""
    up = [name for name in sorted(addresses) if not addresses[name].startswith("127.") and _read(root / name / "carrier") != "0"]
    found = "; ".join(f"{name} {addresses[name]} ({_speed(root / name)}MTU {_read(root / name / 'mtu') or '?'})" for name in up)
    return ok("network interfaces", found or "loopback only")


def _speed(interface: Path) -> str:
    """In words; nothing for one that doesn't say (a bridge says -1, or gives an error)."""
    text = _read(interface / "speed")
    return f"{int(text) / 1000:g} Gb/s, " if text.isdecimal() else ""


def check_host_name(own_name: str, address_of_name: str | None, addresses: Mapping[str, str], gloo_interface: str) -> Finding:
    """gloo tells other nodes the address that this node's own name has, unless it is told an interface."""
    what = "own name"
    if gloo_interface:
        return ok(what, f"{own_name}; gloo uses {gloo_interface} (GLOO_SOCKET_IFNAME)")
    others = sorted(name for name, address in addresses.items() if not address.startswith("127."))
    remedy = f"export GLOO_SOCKET_IFNAME={others[0] if others else 'eth0'} (the interface to the other nodes)"
    if address_of_name is None:
        return fail(what, f"{own_name} has no address, and gloo needs one", remedy)
    if address_of_name.startswith("127."):
        return fail(what, f"{own_name} is {address_of_name} to this node itself, which no other node reaches", remedy)
    return ok(what, f"{own_name} is {address_of_name}")


def address_of(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def check_rdma(root: Path, *, needed: bool, environment: Mapping[str, str]) -> Iterator[Finding]:
    """InfiniBand and RoCE ports under `root` (/sys/class/infiniband), and what NCCL is told about them."""
    ports = sorted(root.glob("*/ports/*"))
    if not ports:
        remedy = "load the NIC's driver (mlx5_ib), or pass /dev/infiniband and the devices into the container; else NCCL uses TCP"
        yield warn("RDMA devices", NOT_HERE, remedy) if needed else ok("RDMA devices", f"{NOT_HERE}; the flags need none")
        return
    active = [port for port in ports if "ACTIVE" in _read(port / "state")]
    found = "; ".join(_describe(port) for port in active) or f"{len(ports)} ports, none active"
    if active or not needed:
        yield ok("RDMA devices", found)
    else:
        yield fail("RDMA devices", found, "check cables and switch (ibstat), or set NCCL_IB_DISABLE=1 to use TCP")
    yield from _check_rdma_environment(root, active, environment)


def check_gpudirect(modules: Path, params: Path, *, deepep: bool) -> Iterator[Finding]:
    """What lets NICs and GPUs reach each other: the peer-memory module, and for DeepEP's IBGDA two options of the driver."""
    if (modules / "nvidia_peermem").is_dir():
        yield ok("GPUDirect RDMA", "nvidia_peermem is loaded")
    else:
        remedy = "modprobe nvidia_peermem, or check that the driver is the open one (DMA-BUF, CUDA >= 11.7, Linux >= 5.12)"
        yield warn("GPUDirect RDMA", "nvidia_peermem is not loaded", remedy)
    if not deepep:
        return
    text = _read(params)
    missing = [option for option in ("EnableStreamMemOPs: 1", "PeerMappingOverride=1") if option not in text]
    if missing:
        remedy = (
            'options nvidia NVreg_EnableStreamMemOPs=1 NVreg_RegistryDwords="PeerMappingOverride=1;" in /etc/modprobe.d, reboot'
        )
        yield warn("IBGDA (NVSHMEM)", f"{params} lacks {' and '.join(missing)}", remedy)
    else:
        yield ok("IBGDA (NVSHMEM)", "the driver's options are set")


def _check_rdma_environment(root: Path, active: list[Path], environment: Mapping[str, str]) -> Iterator[Finding]:
    asked = environment.get("NCCL_IB_HCA", "").removeprefix("=")
    if asked and not asked.startswith("^"):
        devices = sorted(device.name for device in root.iterdir())
        wrong = [name for name in asked.split(",") if not any(device.startswith(name.split(":")[0]) for device in devices)]
        if wrong:
            remedy = f"set NCCL_IB_HCA to some of {','.join(devices)}, or leave it out"
            yield fail("NCCL_IB_HCA", f"{', '.join(wrong)}: no such device", remedy)
        else:
            yield ok("NCCL_IB_HCA", asked)
    index = environment.get("NCCL_IB_GID_INDEX")
    ethernet = [port for port in active if "Ethernet" in _read(port / "link_layer")]
    if index is not None:
        empty = [port for port in active if not _is_gid(_read(port / "gids" / index))]
        if empty:
            remedy = f"set NCCL_IB_GID_INDEX to {_roce_v2_index(empty[0]) or 'an index that show_gids lists'}, or leave it out"
            yield fail("NCCL_IB_GID_INDEX", f"{index}: {empty[0].parent.parent.name} has no GID there", remedy)
        else:
            yield ok("NCCL_IB_GID_INDEX", index)
    elif any(_roce_v2_index(port) is None for port in ethernet):
        yield warn("RoCE", "a port without a RoCE v2 GID", "give its interface an IP address; show_gids should then list RoCE v2")


def _describe(port: Path) -> str:
    device, layer, rate = port.parent.parent.name, _read(port / "link_layer"), _read(port / "rate")
    gids = sum(_is_gid(_read(gid)) for gid in (port / "gids").glob("*"))
    index = _roce_v2_index(port)
    return f"{device} port {port.name} {layer} {rate}, {gids} GIDs" + (f" (RoCE v2: {index})" if index is not None else "")


def _roce_v2_index(port: Path) -> str | None:
    """The first GID index of RoCE v2 with an IPv4 address, as NCCL wants it; else the first of RoCE v2."""
    indices = sorted((path.name for path in (port / "gid_attrs" / "types").glob("*") if "RoCE v2" in _read(path)), key=int)
    indices = [index for index in indices if _is_gid(_read(port / "gids" / index))]
    mapped = [index for index in indices if _read(port / "gids" / index).startswith("0000:0000:0000:0000:0000:ffff:")]
    return next(iter(mapped or indices), None)


def _is_gid(text: str) -> bool:
    return any(digit not in "0:" for digit in text)


def _read(path: Path) -> str:
    # An index without a GID gives an error, not an empty file.
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def check_network(address: str | None, *, rdma: bool, deepep: bool) -> Iterator[Finding]:
    """All of them. `address`: --dist-init-addr of a server of several nodes, else None. `rdma`: GPUs talk to other machines."""
    environment, addresses = os.environ, interfaces()
    yield check_interfaces(Path("/sys/class/net"), addresses)
    if address is not None:
        yield check_interface(address, addresses, environment)
        host, _ = split_address(address)
        # On loopback (a trial on one machine) ranks are told to use it.
        if not (address_of(host) or "").startswith("127."):
            name = socket.gethostname()
            yield check_host_name(name, address_of(name), addresses, environment.get("GLOO_SOCKET_IFNAME", ""))
    yield from check_rdma(Path("/sys/class/infiniband"), needed=rdma, environment=environment)
    if rdma:
        yield from check_gpudirect(Path("/sys/module"), DRIVER_PARAMS, deepep=deepep)
