"""The role of an instance, prefill or decode: its transfer backend, its rows of the resolution report, and what its ranks are told.

Knows flags, no sockets of its own. What a role means for dispatch is decided in `launch/disaggregation/roles.py`.
"""

from __future__ import annotations

import hashlib
import socket
import uuid
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Literal

from moesaic.launch.config import DeviceName, ResolvedConfig, ServerConfig, TransferBackend
from moesaic.launch.conflicts import Conflict
from moesaic.launch.disaggregation.backends import missing_reason
from moesaic.launch.disaggregation.roles import role_conflicts
from moesaic.launch.endpoints import split_address
from moesaic.launch.engine.rank_spec import RoleSpec
from moesaic.launch.errors import ConfigError
from moesaic.launch.memory_parts import DEFAULT_HOST_KV_GB
from moesaic.launch.report import Choice

ANY_ADDRESS = ("0.0.0.0", "::")
_SETTINGS = {
    "disaggregation_transfer_backend": ("prefill", "decode"),
    "disaggregation_bootstrap_port": ("prefill", "decode"),
    "disaggregation_ib_device": ("prefill", "decode"),
    "disaggregation_timeout": ("prefill", "decode"),
    "disaggregation_checksum": ("decode",),
    "num_reserved_decode_tokens": ("decode",),
    "disaggregation_host_kv_gb": ("decode",),
}


def role_flag_conflicts(config: ServerConfig) -> Iterator[Conflict]:
    """Modes that the role rules out, and settings of a role that the instance does not have."""
    role = config.disaggregation_mode
    yield from role_conflicts(role, config.deepep_mode)
    defaults = {field.name: field.default for field in fields(ServerConfig)}
    for name, roles in _SETTINGS.items():
        value = getattr(config, name)
        if role not in roles and value != defaults[name]:
            flag = "--" + name.replace("_", "-")
            yield Conflict(
                flags=f"{flag} with --disaggregation-mode {role}",
                reason=f"it is a setting of {' and '.join(roles)} instances and would have no effect",
                remedy=f"leave {flag} out, or use --disaggregation-mode {' or '.join(roles)}",
            )


def resolve_backend(config: ServerConfig, device: DeviceName) -> tuple[TransferBackend, tuple[Choice, ...]]:
    """The transfer backend ("none" without a role), and the role's rows of the report.

    Raises ConfigError for a backend that can't be had.
    """
    role = config.disaggregation_mode
    if role == "null":
        return "none", ()
    what = {"prefill": "prefill: normal mode only, no graphs", "decode": "decode: low-latency mode only, graphs always eligible"}
    backend, choice = _backend_choice(config.disaggregation_transfer_backend, device)
    rows = (Choice(capability="role", chosen=what[role]), choice)
    return backend, (*rows, _retraction_choice(config.disaggregation_host_kv_gb)) if role == "decode" else rows


def _backend_choice(asked: Literal["auto", "tcp", "nixl", "mooncake"], device: DeviceName) -> tuple[TransferBackend, Choice]:
    if asked != "auto":
        reason = missing_reason(asked, device)
        if reason is not None:
            raise ConfigError(f"--disaggregation-transfer-backend {asked}: {reason}")
        return asked, Choice(capability="KV transfer", chosen=asked)
    if device == "cpu":
        # Not a downgrade: between CPUs the others would copy through sockets or shared memory as well.
        refused = (("nixl", "the device is cpu; ask for it by --disaggregation-transfer-backend nixl"),)
        return "tcp", Choice(capability="KV transfer", chosen="tcp", refused=refused)
    missing: list[tuple[str, str]] = []
    candidates: tuple[Literal["nixl", "mooncake"], ...] = ("nixl", "mooncake")
    for name in candidates:
        reason = missing_reason(name, device)
        if reason is None:
            return name, Choice(capability="KV transfer", chosen=name, refused=tuple(missing))
        missing.append((name, reason))
    raise ConfigError("KV on GPUs needs nixl or mooncake to travel: " + "; ".join(f"{name}: {why}" for name, why in missing))


def _retraction_choice(host_kv_gb: float | None) -> Choice:
    capability, kept = "KV of retracted requests", "kept in host memory"
    if host_kv_gb == 0:
        return Choice(capability=capability, chosen="computed again", refused=((kept, "--disaggregation-host-kv-gb 0"),))
    most = f"{DEFAULT_HOST_KV_GB if host_kv_gb is None else host_kv_gb:g} GB per rank"
    if host_kv_gb is None:
        most += ", or half of what this machine has left"
    return Choice(capability=capability, chosen=f"{kept}, up to {most}, where that is cheaper")


def plan_role(config: ServerConfig, resolved: ResolvedConfig, host_kv_gb: float) -> RoleSpec | None:
    """What the ranks are told; None without a role. `host_kv_gb`: as the memory plan has settled it."""
    if config.disaggregation_mode == "null":
        return None
    assert resolved.transfer_backend != "none"
    host = reachable_host(config)
    return RoleSpec(
        role=config.disaggregation_mode,
        instance=f"{host}:{config.port}/{uuid.uuid4().hex[:6]}",
        model_id=_model_id(config.model_path),
        host=host,
        backend=resolved.transfer_backend,
        bootstrap_address=bootstrap_address(config) if config.disaggregation_mode == "prefill" else "",
        ib_device=config.disaggregation_ib_device or "",
        num_reserved_decode_tokens=config.num_reserved_decode_tokens if config.disaggregation_mode == "decode" else 0,
        host_kv_gb=host_kv_gb,
        timeout_s=float(config.disaggregation_timeout),
        checksum=config.disaggregation_checksum,
    )


def asked_host_kv_gb(config: ServerConfig) -> float | None:
    """Host memory of a rank for the KV of retracted requests, in 1e9 bytes; None: as there is. Only decode instances keep any."""
    return config.disaggregation_host_kv_gb if config.disaggregation_mode == "decode" else 0.0


def reachable_host(config: ServerConfig) -> str:
    """Where other machines reach this one: --host, or for "all addresses" the one that leads outside."""
    if config.host not in ANY_ADDRESS:
        return config.host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; the address is reserved for documentation
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def bootstrap_address(config: ServerConfig) -> str:
    """host:port of a prefill instance's bootstrap server: on node 0."""
    host = reachable_host(config)
    if config.nnodes > 1:
        assert config.dist_init_addr is not None
        host = split_address(config.dist_init_addr)[0]
    return f"{host}:{config.disaggregation_bootstrap_port}"


def _model_id(model_path: str) -> str:
    """The folder's name, and what its config.json holds."""
    folder = Path(model_path)
    return f"{folder.name}/{hashlib.sha256((folder / 'config.json').read_bytes()).hexdigest()[:12]}"
