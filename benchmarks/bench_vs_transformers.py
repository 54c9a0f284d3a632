"""Tokens per second of the engine against HF transformers' `generate`, same checkpoint, same prompts, greedy, fp32, same threads.

The physics: at small batches a decode step is bound by reading weights. One request touches top-k experts per layer, 64 requests
nearly all of them, so a step can't be faster than (weight bytes touched) / (memory bandwidth). Both sides run in this process, one
after the other, warmed up, with the allocator settings that `moesaic serve` gives its ranks (they speed up HF too); the last column
says how many requests got exactly HF's tokens.

Usage: python benchmarks/bench_vs_transformers.py [--quick] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from engine_jobs import EngineSettings, greedy_request, make_engine, run_waves
from tiny_models import TinyModel, make_tiny_model

MODEL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 2048,
}


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, MODEL["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def time_transformers(model: TinyModel, prompts: list[list[int]], new_tokens: list[int]) -> tuple[float, list[list[int]]]:
    """Seconds for one padded batch; HF runs every row until the longest is done, as `generate` does."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    options = {"max_new_tokens": max(new_tokens), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    start = time.perf_counter()
    out = model.oracle.generate(ids, attention_mask=mask, **options)
    seconds = time.perf_counter() - start
    return seconds, [row[longest : longest + count].tolist() for row, count in zip(out, new_tokens, strict=True)]


def time_engine(model: TinyModel, prompts: list[list[int]], new_tokens: list[int]) -> tuple[float, list[list[int]]]:
    settings = EngineSettings(
        model_path=str(model.folder),
        page_size=16,
        num_pages=4096,
        max_running=64,
        chunk_tokens=2048,
        context_length=2048,
        prefix_cache=False,
        mode="normal",  # this and the next: what `moesaic serve` resolves to for one CPU rank
        overlap_schedule=False,
    )
    engine = make_engine(settings)
    requests = [greedy_request(i, *pair) for i, pair in enumerate(zip(prompts, new_tokens, strict=True))]
    start = time.perf_counter()
    finished = run_waves(engine, [requests])
    return time.perf_counter() - start, [finished[i].tokens for i in range(len(prompts))]


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of requests whose tokens are all equal (near-ties may differ: padding changes HF's own sums)."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def with_rank_environment() -> None:
    """Start again with glibc's allocator told not to return memory after every large tensor, as the launcher does for its ranks."""
    settings = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def main() -> None:
    with_rank_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    length = 16 if args.quick else 64
    mixed = [16 + 37 * i % 240 for i in range(64)]
    cases = {
        "bs1": (prompts_of([32], 1), [length]),
        "bs8": (prompts_of([32] * 8, 2), [length] * 8),
        "bs64": (prompts_of([32] * 64, 3), [length] * 64),
        "mixed": (prompts_of(mixed, 4), [max(4, (53 * i) % (2 * length)) for i in range(64)]),
    }
    table = Table(title=f"decode throughput, fp32, {args.threads} threads (best of {args.repeats})")
    for column in ("case", "requests", "new tokens", "HF tok/s", "moesaic tok/s", "ratio", "equal requests"):
        table.add_column(column, justify="right")
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder), "plain", **MODEL)
        for name, (prompts, counts) in cases.items():
            time_engine(model, prompts, [2] * len(counts))
            theirs, ours, equal = [], [], 1.0
            for _ in range(args.repeats):
                hf_s, hf_tokens = time_transformers(model, prompts, counts)
                our_s, our_tokens = time_engine(model, prompts, counts)
                theirs.append(sum(counts) / hf_s)
                ours.append(sum(counts) / our_s)
                equal = min(equal, agreement(our_tokens, hf_tokens))
            ratio = max(ours) / max(theirs)
            result[f"ratio_{name}"] = round(ratio, 2)
            row = (name, len(prompts), sum(counts), f"{max(theirs):.0f}", f"{max(ours):.0f}", f"{ratio:.2f}x", f"{equal:.0%}")
            table.add_row(*map(str, row))
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
