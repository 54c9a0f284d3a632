"""What a decode rank keeps free for running requests' growth: a fixed number of tokens each, or what lately observed lengths say.

And what retraction costs where the KV is kept: pages of DeepSeek-V3's 61 layers to host memory and back (`attention/host_pool.py`),
on the CPU, where "device" and host are the same memory. The floor is copying as many bytes once in each direction.

The real scheduler on simulated traffic, without a model: prompts come computed, as from a prefill instance, and every request stops
at a length drawn by chance that nobody knows. There is always a request waiting, so memory is the limit. Three reserves:
`fixed` as SGLang (--num-reserved-decode-tokens for every running request, always), `observed` (the default), and `none`.
Retraction costs a copy to host memory and back, or a prefill; admission is throughput, as decode is faster per token in larger
batches. The bound is full memory: all pages hold tokens, always.

Usage: python benchmarks/bench_admission.py
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from simulated_admission import (
    MAX_NEW_TOKENS,
    NUM_PAGES,
    PAGE_SIZE,
    RESERVED_TOKENS,
    FixedReserve,
    short_answers,
    simulate,
)

from moesaic.attention.host_pool import HostKVPool
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.launch.engine.growth import Growth
from moesaic.launch.engine.sequence import Int64Array

NUM_REQUESTS = 1500

RESERVES: dict[str, Callable[[], Growth]] = {
    "none": lambda: FixedReserve(0),
    "fixed": lambda: FixedReserve(RESERVED_TOKENS),
    "observed": lambda: Growth(RESERVED_TOKENS),
}

Lengths = Callable[[np.random.Generator, int], Int64Array]
"""Output lengths of n requests."""


def mixed(rng: np.random.Generator, n: int) -> Int64Array:
    """One in five is a long one: median 900."""
    return np.where(
        rng.random(n) < 0.2, np.clip(rng.lognormal(np.log(900), 0.5, n).astype(np.int64), 1, MAX_NEW_TOKENS), short_answers(rng, n)
    )


def changing(rng: np.random.Generator, n: int) -> Int64Array:
    """Short ones, then eight times longer ones, in turns of 500 requests."""
    return np.minimum(short_answers(rng, n) * np.where(np.arange(n) // 500 % 2, 8, 1), MAX_NEW_TOKENS)


TRAFFIC: dict[str, Lengths] = {"short": short_answers, "mixed": mixed, "changing": changing}


def copy_speeds(num_tokens: int) -> tuple[float, float, float]:
    """Milliseconds to host memory, back, and for two bare copies of as many bytes; medians of seven."""
    num_pages = num_tokens // 64
    pool = LatentKVPool(
        num_layers=61, num_pages=2 * num_pages, page_size=64, latent_dim=576, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    host = HostKVPool(pool, num_pages)
    pages = np.random.default_rng(0).permutation(2 * num_pages)[:num_pages].astype(np.int32)
    source, target = (torch.zeros(61 * num_tokens * 576, dtype=torch.bfloat16) for _ in range(2))
    times: list[tuple[float, float, float]] = []
    for _ in range(8):
        marks = [time.perf_counter()]
        kept = host.store(pages)
        marks.append(time.perf_counter())
        host.load(kept, pages)
        marks.append(time.perf_counter())
        target.copy_(source)
        source.copy_(target)
        marks.append(time.perf_counter())
        host.free(kept)
        times.append((marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]))
    out, back, bare = (statistics.median(column) * 1e3 for column in zip(*times[1:], strict=True))  # the first touches the memory
    return out, back, bare


def print_copies() -> dict[str, float]:
    torch.set_num_threads(1)
    table = Table(title="a retracted sequence's KV, DeepSeek-V3, bf16, one thread")
    for column in ("tokens", "MB", "to host memory, ms", "back, ms", "two bare copies, ms", "GB/s"):
        table.add_column(column, justify="right")
    result = {}
    for num_tokens in (1024, 4096):
        megabytes = num_tokens * 61 * 576 * 2 / 1e6
        out, back, bare = copy_speeds(num_tokens)
        speed = 2 * megabytes / (out + back)
        table.add_row(str(num_tokens), f"{megabytes:.0f}", f"{out:.1f}", f"{back:.1f}", f"{bare:.1f}", f"{speed:.1f}")
        result |= {
            f"kept_ms_{num_tokens}": round(out + back, 2),
            f"kept_share_of_bare_copy_{num_tokens}": round(bare / (out + back), 3),
        }
    Console().print(table)
    return result


def main() -> None:
    table = Table(title=f"{NUM_REQUESTS} requests, {NUM_PAGES * PAGE_SIZE} tokens of KV, max_new_tokens {MAX_NEW_TOKENS}")
    for column in ("answers", "reserve", "running on average", "memory used", "retracted per 100", "steps until all were admitted"):
        table.add_column(column, justify="left" if column in ("answers", "reserve") else "right")
    result: dict[str, float] = {}
    for traffic, draw in TRAFFIC.items():
        lengths = draw(np.random.default_rng(1), NUM_REQUESTS)
        for name, make in RESERVES.items():
            outcome = simulate(make(), lengths)
            row = (f"{outcome.running:.1f}", f"{outcome.usage:.0%}", f"{outcome.retracted:.1f}", str(outcome.steps))
            table.add_row(traffic, name, *row)
            key = f"{traffic}_{name}".replace(" ", "_")
            result |= {f"{key}_running": round(outcome.running, 1), f"{key}_retracted": round(outcome.retracted, 2)}
    Console().print(table)
    print(json.dumps(result | print_copies()))


if __name__ == "__main__":
    main()
