"""How much memory a rank has, how much of it the KV pool may take, and how many pages that is.

`launch/memory_plan.py` foretells with the same functions, before weights load, what a rank does here after it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from moesaic.launch.config import ResolvedConfig
from moesaic.launch.topology import Topology

MAX_DEFAULT_TOKENS = 1 << 20
"""More than this per DP rank is allocated on a CPU only on demand (`--max-total-tokens`): other programs use the memory too."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Of one rank, in bytes: its share of its GPU, or on a CPU of what could be had now without swapping (then both are equal)."""

    total: int
    free: int


def sharers(config: ResolvedConfig, topology: Topology) -> int:
    """How many ranks have a memory together: those of a node on a CPU, those of a GPU."""
    return topology.ranks_per_node if config.device == "cpu" else min(config.ranks_per_gpu, topology.ranks_per_node)


def measure_memory(device: str, num_sharers: int) -> DeviceMemory:
    """`device`: "cpu" or "cuda:0", whose context this process then has. num_sharers: ranks whose memory it is, equally."""
    if device == "cpu":
        share = available_bytes() // num_sharers
        return DeviceMemory(total=share, free=share)
    import torch

    free, total = torch.cuda.mem_get_info(torch.device(device))
    return DeviceMemory(total=total // num_sharers, free=free // num_sharers)


def kv_budget_bytes(config: ResolvedConfig, memory: DeviceMemory) -> int:
    """What the KV pool of one rank may take of the memory that is free once the weights are there.

    On a GPU `mem_fraction_static` is the share of weights and KV in all of its memory, as in SGLang; on a CPU that of KV in what is
    left, since other programs use the memory too.
    """
    if config.device == "cpu":
        return int(memory.free * config.mem_fraction_static)
    return memory.free - int(memory.total * (1 - config.mem_fraction_static))


def plan_num_pages(config: ResolvedConfig, kv_bytes_per_token: int, budget_bytes: int) -> int:
    """Pages of one rank: `max_total_tokens`, or what the budget gives.

    Raises ValueError when not even one sequence of the context length fits.
    """
    if config.max_total_tokens is not None:
        return max(1, config.max_total_tokens // config.page_size)
    num_tokens = max(0, budget_bytes // kv_bytes_per_token)
    if config.device == "cpu":
        num_tokens = min(num_tokens, config.max_running_requests_per_dp * config.context_length, MAX_DEFAULT_TOKENS)
    num_pages = num_tokens // config.page_size
    if num_pages * config.page_size < config.context_length:
        raise ValueError(
            f"KV for one sequence of {config.context_length} tokens needs "
            f"{config.context_length * kv_bytes_per_token / 1e6:.0f} MB per rank, but --mem-fraction-static "
            f"{config.mem_fraction_static} leaves {budget_bytes / 1e6:.0f} MB: raise it or lower --context-length"
        )
    return num_pages


def plan_num_host_pages(config: ResolvedConfig, host_kv_gb: float, kv_bytes_per_token: int, num_pages: int) -> int:
    """Host pages of one rank for retracted sequences: `host_kv_gb` (1e9 bytes), but no more than all that `num_pages` hold."""
    return min(int(host_kv_gb * 1e9) // (kv_bytes_per_token * config.page_size), num_pages)


def available_bytes() -> int:
    """Memory that could be had now without swapping (Linux's MemAvailable; elsewhere all physical memory)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
