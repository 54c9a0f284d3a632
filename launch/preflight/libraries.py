"""The versions of what GPUs need: libraries and driver, as they are installed here. Judges nothing and makes no CUDA context."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

from moesaic.launch.gpus import query_gpus

NVSHMEM_PACKAGES = ("nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13")


def nccl_version() -> str | None:
    """Such as "2.27.3"; None where torch has no NCCL."""
    import torch

    if torch.version.cuda is None:
        return None
    found: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, found))


def module_version(module: str) -> str | None:
    """Its distribution's version, "version unknown" without one, None where it can't be imported. Imports nothing."""
    if importlib.util.find_spec(module) is None:
        return None
    names = importlib.metadata.packages_distributions().get(module, [])
    return importlib.metadata.version(names[0]) if names else "version unknown"


def nvshmem_version() -> str | None:
    """Of the NVSHMEM that DeepEP's setup takes: NVSHMEM_DIR's, as its header says, else the package's. None where there is none."""
    folder = os.environ.get("NVSHMEM_DIR")
    if folder:
        return _header_version(Path(folder) / "include" / "non_abi" / "nvshmem_version.h")
    found = []
    for name in NVSHMEM_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(importlib.metadata.version(name))
    return " and ".join(found) or None


def _header_version(header: Path) -> str:
    try:
        text = header.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"version unknown ({header}: {error.strerror})"
    numbers = (re.search(rf"#define\s+NVSHMEM_VENDOR_{part}_VERSION\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH"))
    return ".".join("?" if number is None else number[1] for number in numbers)


def versions() -> dict[str, str]:
    """What should be the same on every node besides what `serve` compares, by the name a person knows it by."""
    absent = "absent"
    try:
        gpus = query_gpus()
    except OSError:
        gpus = ()
    return {
        "triton version": module_version("triton") or absent,
        "NCCL version": nccl_version() or absent,
        "DeepEP version": module_version("deep_ep") or absent,
        "NVSHMEM version": nvshmem_version() or absent,
        "DeepGEMM version": module_version("deep_gemm") or absent,
        "GPU driver": gpus[0].driver if gpus else absent,
        "GPUs": " and ".join(sorted({gpu.name for gpu in gpus})) or absent,
    }
