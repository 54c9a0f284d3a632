"""Several ranks on one GPU (`--ranks-per-gpu`): how many GPUs that takes, what can't be had so, and how such ranks talk.

For trying a layout of many ranks on few GPUs: everything works as it would, only slowly. Never chosen by itself. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from moesaic.launch.config import DeviceName, ServerConfig
from moesaic.launch.conflicts import Conflict
from moesaic.launch.deepep_rules import DEEPEP_BACKENDS
from moesaic.launch.report import Choice
from moesaic.launch.topology import Topology

Communication = Literal["gloo", "nccl", "staged"]


def gpus_per_node(config: ServerConfig, topology: Topology) -> int:
    """How many GPUs a node's ranks want."""
    return -(-topology.ranks_per_node // config.ranks_per_gpu)


def shares_gpus(config: ServerConfig, topology: Topology) -> bool:
    """Whether a rank has to share its GPU with another."""
    return config.ranks_per_gpu > 1 and topology.world_size > 1


def too_few_gpus(config: ServerConfig, topology: Topology, num_gpus: int) -> str:
    """Why `num_gpus` don't do, and with which flag they would."""
    ranks = topology.ranks_per_node
    sharing = "" if config.ranks_per_gpu == 1 else f", {config.ranks_per_gpu} of them on a GPU"
    return (
        f"{ranks} ranks per node{sharing}, and torch sees {num_gpus} CUDA devices "
        f"(--ranks-per-gpu {-(-ranks // num_gpus)} makes ranks share them, slowly)"
    )


def shared_gpu_conflicts(config: ServerConfig, device: DeviceName) -> Iterator[Conflict]:
    """What does not go with ranks that share a GPU; nothing where none do."""
    flag = f"--ranks-per-gpu {config.ranks_per_gpu}"
    if config.ranks_per_gpu == 1:
        return
    if device == "cpu":
        yield Conflict(flags=flag, reason="the device is cpu, which all ranks share anyway", remedy=f"leave {flag} out")
    elif config.moe_a2a_backend in DEEPEP_BACKENDS:
        yield Conflict(
            flags=f"{flag} --moe-a2a-backend {config.moe_a2a_backend}",
            reason="DeepEP takes one rank per GPU",
            remedy="--moe-a2a-backend torch, symm or none",
        )


def communication(config: ServerConfig, device: DeviceName, topology: Topology) -> tuple[Communication, Choice]:
    """What carries the collectives, and the report's row."""
    if device == "cpu":
        return "gloo", Choice(capability="communication", chosen="gloo")
    if not shares_gpus(config, topology):
        return "nccl", Choice(capability="communication", chosen="nccl")
    # Not a downgrade: it was asked for in so many words.
    return "staged", Choice(
        capability="communication",
        chosen=f"gloo through host memory: {config.ranks_per_gpu} ranks share a GPU (for trying layouts, not for speed)",
        refused=(("nccl", f"--ranks-per-gpu {config.ranks_per_gpu}: it takes one rank per GPU"),),
    )
