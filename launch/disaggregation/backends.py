"""The transfer backends by name, imported only when one is wanted, and why one can't be had."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Literal

from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.transfer import Backend

BackendName = Literal["tcp", "nixl", "mooncake", "fake"]

_MODULES = {"nixl": "nixl._api", "mooncake": "mooncake.engine"}
_REMEDIES = {
    "nixl": "pip install --no-deps nixl nixl-cu12 (nixl-cu13 with CUDA 13)",
    "mooncake": (
        "pip install mooncake-transfer-engine (-non-cuda without a GPU), and the system's libibverbs1 librdmacm1 libnl-3-200 "
        "libnl-route-3-200"
    ),
}


def missing_reason(name: BackendName, device: Literal["cpu", "cuda"] = "cpu") -> str | None:
    """Why this backend can't move KV on this machine, with the remedy; None if it can. Imports its package."""
    if device == "cuda" and name in ("tcp", "fake"):
        return f"{name} moves CPU memory only, and the KV is on the GPU"
    if name not in _MODULES:
        return None
    try:
        importlib.import_module(_MODULES[name])
    except ImportError as error:
        return f"{error}; {_REMEDIES[name]}"
    return None


def make_backend(name: BackendName, memory: PagedMemory, *, host: str = "127.0.0.1", ib_device: str = "") -> Backend:
    """One rank's backend over its memory. `host`: what others reach this machine by. Raises ValueError when it can't be had."""
    reason = missing_reason(name, "cpu" if memory.device_index is None else "cuda")
    if reason is not None:
        raise ValueError(f"--disaggregation-transfer-backend {name}: {reason}")
    if name == "nixl":
        from moesaic.launch.disaggregation.nixl import NixlBackend

        return NixlBackend(memory)
    if name == "mooncake":
        from moesaic.launch.disaggregation.mooncake import MooncakeBackend

        return MooncakeBackend(memory, host, ib_device)
    if name == "tcp":
        from moesaic.launch.disaggregation.tcp import TcpBackend

        return TcpBackend(memory, host)
    from moesaic.launch.disaggregation.fake import FakeBackend

    return FakeBackend(memory)
