"""The GPUs of this machine as `nvidia-smi` tells them: no CUDA context is made for it, which would take half a gigabyte of one."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

QUERY = ("index", "name", "memory.total", "memory.free", "driver_version")
QUERY_SECONDS = 20.0
"""A driver that is not resident yet takes seconds to answer."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Bytes. `free`: by all processes now."""

    index: int
    name: str
    total: int
    free: int
    driver: str


def query_gpus() -> tuple[Gpu, ...]:
    """All GPUs of the machine; none where there is no NVIDIA driver. Raises OSError with its words where it doesn't answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False)
    except FileNotFoundError:
        return ()
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi has not answered within {QUERY_SECONDS:g} s") from None
    if done.returncode:
        raise OSError(f"nvidia-smi: {(done.stdout or done.stderr).strip().splitlines()[0]}")
    return parse_gpus(done.stdout)


def parse_gpus(answer: str) -> tuple[Gpu, ...]:
    """nvidia-smi's lines, such as "0, NVIDIA H200, 143771, 143167, 570.133.20"; memory in MiB. Raises OSError for other lines."""
    gpus = []
    for line in answer.strip().splitlines():
        try:
            index, name, total, free, driver = (field.strip() for field in line.split(","))
            gpus.append(Gpu(index=int(index), name=name, total=int(total) << 20, free=int(free) << 20, driver=driver))
        except ValueError:
            raise OSError(f"nvidia-smi says {line!r}, which is not {', '.join(QUERY)}") from None
    return tuple(gpus)
