"""What the system lets this node's processes have: shared memory, locked memory, open files, cores. Knows no device."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moesaic.launch.preflight.findings import Finding, fail, ok, warn

GIB = 1 << 30
SHM = Path("/dev/shm")
SHM_BYTES = GIB
"""What NVIDIA asks for NCCL in a container (`--shm-size=1g`); Docker's and Kubernetes' default is 64 MiB."""
BASE_FILES = 256
FILES_PER_RANK = 16
"""Sockets of a rank to each other one: two for each process group of gloo, some for ZMQ and stores."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the flags ask of a node. `rdma`: GPUs talk to other machines. `connections`: HTTP clients at once."""

    ranks_per_node: int
    world_size: int
    connections: int
    cuda: bool
    rdma: bool


def check_limits(needs: Needs) -> Iterator[Finding]:
    """All of them, as this process has them (its children inherit them)."""
    yield check_shm(needs, SHM)
    yield check_memlock(needs, resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    yield check_nofile(needs, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield check_cores(needs, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def check_shm(needs: Needs, folder: Path) -> Finding:
    """NCCL's ranks of one node meet in shared memory."""
    needed = needs.cuda and needs.ranks_per_node > 1
    remedy = (
        "docker run --shm-size=16g; in Kubernetes an emptyDir with `medium: Memory` at /dev/shm; else mount -o remount,size=16g"
    )
    if not folder.is_dir():
        return fail("shared memory", f"no {folder}", remedy) if needed else ok("shared memory", f"no {folder}; not needed")
    usage = shutil.disk_usage(folder)
    found = f"{folder}: {usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f}"
    if needed and usage.free < SHM_BYTES:
        return fail("shared memory", f"{found}; NCCL wants 1 GiB", remedy)
    return ok("shared memory", found)


def check_memlock(needs: Needs, limit: int) -> Finding:
    """RDMA pins the memory that it moves."""
    if limit == resource.RLIM_INFINITY:
        return ok("locked memory (ulimit -l)", "unlimited")
    found = f"{limit / (1 << 20):,.0f} MiB"
    if not needs.rdma:
        return ok("locked memory (ulimit -l)", found)
    remedy = "docker run --ulimit memlock=-1; with Slurm PropagateResourceLimitsExcept=MEMLOCK; else limits.conf: memlock unlimited"
    return fail("locked memory (ulimit -l)", f"{found}, and RDMA pins whole buffers", remedy)


def check_nofile(needs: Needs, limit: int) -> Finding:
    """Sockets: of a rank to all others, and of the HTTP process to its clients."""
    what = "open files (ulimit -n)"
    least = BASE_FILES + FILES_PER_RANK * needs.world_size
    comfortable = least + needs.connections
    if limit == resource.RLIM_INFINITY or limit >= comfortable:
        return ok(what, "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}")
    remedy = f"ulimit -n {max(65536, comfortable)} before the start"
    if limit < least:
        return fail(what, f"{limit:,}; {needs.world_size} ranks need about {least:,}", remedy)
    return warn(what, f"{limit:,}; enough for about {limit - least:,} clients at once, not for {needs.connections:,}", remedy)


def check_cores(needs: Needs, num_cores: int) -> Finding:
    """One for each rank, at least."""
    found = f"{num_cores} for {needs.ranks_per_node} rank" + "s" * (needs.ranks_per_node > 1)
    if num_cores < needs.ranks_per_node:
        return warn("CPU cores", found, "give the job more cores, or run fewer ranks on this node")
    return ok("CPU cores", found)
