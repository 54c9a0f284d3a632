"""How many pages of KV a rank may have."""

from __future__ import annotations

import os

from moesaic.launch.config import ResolvedConfig

MAX_DEFAULT_TOKENS = 1 << 20
"""More than this per DP rank is allocated only on demand (`--max-total-tokens`)."""


def plan_num_pages(config: ResolvedConfig, kv_bytes_per_token: int, ranks_per_node: int) -> int:
    """Pages of one rank: `max_total_tokens`, or its share of `mem_fraction_static` of the memory that is free now.

    Raises ValueError when not even one sequence of the context length fits.
    """
    if config.max_total_tokens is not None:
        return max(1, config.max_total_tokens // config.page_size)
    budget = int(_available_bytes() * config.mem_fraction_static / ranks_per_node)
    wanted = min(config.max_running_requests_per_dp * config.context_length, MAX_DEFAULT_TOKENS)
    num_pages = min(budget // kv_bytes_per_token, wanted) // config.page_size
    if num_pages * config.page_size < config.context_length:
        raise ValueError(
            f"KV for one sequence of {config.context_length} tokens needs "
            f"{config.context_length * kv_bytes_per_token / 1e6:.0f} MB per rank, but --mem-fraction-static "
            f"{config.mem_fraction_static} leaves {budget / 1e6:.0f} MB: raise it or lower --context-length"
        )
    return num_pages


def plan_num_host_pages(config: ResolvedConfig, host_kv_gb: float, kv_bytes_per_token: int, num_pages: int) -> int:
    """Host pages of one rank for retracted sequences: `host_kv_gb` (1e9 bytes), but no more than all that `num_pages` hold."""
    return min(int(host_kv_gb * 1e9) // (kv_bytes_per_token * config.page_size), num_pages)


def _available_bytes() -> int:
    """Memory that could be had now without swapping (Linux's MemAvailable; elsewhere all physical memory)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
