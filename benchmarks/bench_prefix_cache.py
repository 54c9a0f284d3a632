"""How fast the prefix cache is when it is full: match + allocate + insert + release per second at 100k cached pages.

Prompts of 1,000 to 4,000 tokens; each starts with one of 64 shared beginnings (system prompts, few-shot examples) and
goes on with text of its own, so the cache is always full and every request evicts about as many pages as it brings. The
floor: a prompt's tokens must be hashed once (bytes -> dict key), which is printed as its own line.

    python benchmarks/bench_prefix_cache.py [--num-pages 100000] [--page-size 16] [--num-requests 2000]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from numpy.typing import NDArray

from moesaic.attention.page_allocator import PageAllocator
from moesaic.attention.prefix_cache import PrefixCache


def make_prompts(num: int, seed: int) -> list[NDArray[np.int32]]:
    """`num` prompts of 1,000 to 4,000 tokens; half of each, on average, is one of 64 shared beginnings."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 129280, size=(64, 4000), dtype=np.int32)
    prompts = []
    for _ in range(num):
        length = int(rng.integers(1000, 4001))
        num_shared = int(rng.integers(0, length + 1))
        own = rng.integers(0, 129280, size=length - num_shared, dtype=np.int32)
        prompts.append(np.concatenate([shared[rng.integers(64), :num_shared], own]))
    return prompts


def serve(cache: PrefixCache, prompt: NDArray[np.int32]) -> None:
    """One request's whole life in the cache."""
    match = cache.match(prompt, max_tokens=len(prompt) - 1)
    num_pages = -(-len(prompt) // cache.page_size)
    row = np.concatenate([match.pages, cache.allocate(num_pages - len(match.pages))])
    insertion = cache.insert(prompt, row, match.node)
    cache.release(insertion.node)
    cache.allocator.free(insertion.pages[insertion.node.depth :])


def hash_floor_us(prompts: list[NDArray[np.int32]], page_size: int) -> float:
    """Microseconds per prompt to slice it into page keys and hash each once."""
    width, start_s = page_size * 4, time.perf_counter()
    for prompt in prompts:
        data = prompt.tobytes()
        for start in range(0, len(data), width):
            hash(data[start : start + width])
    return (time.perf_counter() - start_s) / len(prompts) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-pages", type=int, default=100_000)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--num-requests", type=int, default=2000)
    args = parser.parse_args()
    cache = PrefixCache(PageAllocator(args.num_pages + 4096), args.page_size)
    filler = iter(make_prompts(args.num_pages * args.page_size // 500, seed=1))
    while cache.num_cached_pages < args.num_pages:
        serve(cache, next(filler))
    num_before, prompts = cache.num_cached_pages, make_prompts(args.num_requests, seed=2)
    hit_before, lookup_before = cache.counters.hit_tokens, cache.counters.lookup_tokens
    latencies_us = np.empty(len(prompts))
    for index, prompt in enumerate(prompts):
        start_s = time.perf_counter()
        serve(cache, prompt)
        latencies_us[index] = (time.perf_counter() - start_s) * 1e6
    hit_rate = (cache.counters.hit_tokens - hit_before) / (cache.counters.lookup_tokens - lookup_before)
    num_prompt_pages = sum(len(prompt) // args.page_size for prompt in prompts)
    mean_us = float(latencies_us.mean())
    print(f"{'cached pages':<34}{num_before:>12,}")
    print(f"{'tokens per prompt, mean':<34}{np.mean([len(prompt) for prompt in prompts]):>12,.0f}")
    print(f"{'hit rate':<34}{hit_rate:>12.1%}")
    print(f"{'requests per second':<34}{1e6 / mean_us:>12,.0f}")
    print(f"{'per request, mean (us)':<34}{mean_us:>12,.1f}")
    print(f"{'per request, p99 (us)':<34}{np.percentile(latencies_us, 99):>12,.1f}")
    print(f"{'per page of prompt (us)':<34}{latencies_us.sum() / num_prompt_pages:>12,.3f}")
    print(f"{'floor: slice and hash once (us)':<34}{hash_floor_us(prompts, args.page_size):>12,.1f}")
    result = {
        "match_insert_per_s_100k": round(1e6 / mean_us),
        "mean_us": round(mean_us, 1),
        "p99_us": round(float(np.percentile(latencies_us, 99)), 1),
        "num_cached_pages": num_before,
        "page_size": args.page_size,
        "hit_rate": round(hit_rate, 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
