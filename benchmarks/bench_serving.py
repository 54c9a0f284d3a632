"""Load on a running server: open loop (a request rate) or closed loop (a number of clients), through /generate with streaming.

Reports time to first token (TTFT), inter-token latency (ITL, every gap), end-to-end latency and throughput. Prompts are random
token ids, so no tokenizer is needed and nothing hits the prefix cache by accident; `--dataset` takes lengths (and arrival times)
from a JSONL in the form of the Mooncake traces: {"timestamp": ms, "input_length": n, "output_length": m} per line.

Usage:
  python benchmarks/bench_serving.py --url http://127.0.0.1:30000 --num-requests 64 --concurrency 16
  python benchmarks/bench_serving.py --url http://127.0.0.1:30000 --num-requests 64 --request-rate 8
  python benchmarks/bench_serving.py --url http://127.0.0.1:30000 --dataset trace.jsonl --time-scale 0.1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


@dataclass(frozen=True)
class Job:
    """One request to send `at` seconds after the start (closed loop ignores it)."""

    at: float
    input_ids: list[int]
    output_tokens: int


@dataclass
class Outcome:
    """Times in seconds from sending; `gaps` between successive chunks."""

    ttft: float = 0.0
    e2e: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None


def make_jobs(args: argparse.Namespace, vocab_size: int) -> list[Job]:
    rng = random.Random(args.seed)
    if args.dataset is not None:
        rows = [json.loads(line) for line in args.dataset.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = rows[: args.num_requests]
        first = rows[0].get("timestamp", 0)
        sizes = [((r.get("timestamp", 0) - first) / 1e3 * args.time_scale, r["input_length"], r["output_length"]) for r in rows]
    else:
        at, sizes = 0.0, []
        for _ in range(args.num_requests):
            at += rng.expovariate(args.request_rate) if args.request_rate else 0.0
            spread = 1 + args.length_spread * (2 * rng.random() - 1)
            sizes.append((at, max(1, round(args.input_length * spread)), max(1, round(args.output_length * spread))))
    return [Job(at, [rng.randrange(10, vocab_size) for _ in range(n)], m) for at, n, m in sizes]


async def send(session: aiohttp.ClientSession, url: str, job: Job) -> Outcome:
    """One streamed /generate."""
    outcome = Outcome()
    sampling = {"temperature": 0, "max_new_tokens": job.output_tokens, "ignore_eos": True}
    body = {"input_ids": job.input_ids, "sampling_params": sampling, "stream": True}
    start = last = time.perf_counter()
    try:
        async with session.post(f"{url}/generate", json=body) as response:
            if response.status != 200:
                outcome.error = f"{response.status}: {(await response.text())[:200]}"
                return outcome
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                now = time.perf_counter()
                if outcome.tokens == 0:
                    outcome.ttft = now - start
                else:
                    outcome.gaps.append(now - last)
                last = now
                outcome.tokens = json.loads(line[6:])["meta_info"]["completion_tokens"]
    except aiohttp.ClientError as error:
        outcome.error = str(error)
    outcome.e2e = last - start
    return outcome


async def run(args: argparse.Namespace, jobs: list[Job]) -> tuple[list[Outcome], float]:
    """All outcomes and the wall time of the run."""
    gate = asyncio.Semaphore(args.concurrency) if args.concurrency else None
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(jobs))
            start = time.perf_counter()

            async def one(job: Job) -> Outcome:
                if gate is None:
                    await asyncio.sleep(max(0.0, start + job.at - time.perf_counter()))
                    outcome = await send(session, args.url, job)
                else:
                    async with gate:
                        outcome = await send(session, args.url, job)
                progress.advance(task)
                return outcome

            outcomes = await asyncio.gather(*(one(job) for job in jobs))
            return list(outcomes), time.perf_counter() - start


def percentiles(values: list[float]) -> dict[str, float]:
    """Mean, p50, p90 and p99 in milliseconds."""
    if not values:
        return dict.fromkeys(("mean", "p50", "p90", "p99"), float("nan"))
    ordered = sorted(values)

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e3

    return {"mean": statistics.fmean(values) * 1e3, "p50": at(0.5), "p90": at(0.9), "p99": at(0.99)}


def report(jobs: list[Job], outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    good = [(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True) if outcome.error is None]
    latencies = {
        "TTFT": [outcome.ttft for _, outcome in good],
        "ITL": [gap for _, outcome in good for gap in outcome.gaps],
        "E2E": [outcome.e2e for _, outcome in good],
    }
    result: dict[str, Any] = {
        "requests": len(jobs),
        "failed": len(jobs) - len(good),
        "seconds": round(seconds, 3),
        "request_per_s": round(len(good) / seconds, 3),
        "input_tok_per_s": round(sum(len(job.input_ids) for job, _ in good) / seconds, 1),
        "output_tok_per_s": round(sum(outcome.tokens for _, outcome in good) / seconds, 1),
    }
    table = Table(title="latency (ms)")
    for column in ("", "mean", "p50", "p90", "p99"):
        table.add_column(column, justify="right")
    for name, values in latencies.items():
        row = percentiles(values)
        table.add_row(name, *(f"{value:.1f}" for value in row.values()))
        result |= {f"{name.lower()}_{key}_ms": round(value, 2) for key, value in row.items()}
    console = Console()
    console.print(table)
    console.print(", ".join(f"{key} {result[key]}" for key in ("request_per_s", "input_tok_per_s", "output_tok_per_s", "failed")))
    for error in sorted({outcome.error for outcome in outcomes if outcome.error})[:3]:
        console.print(f"failed: {error}")
    return result


async def main_async(args: argparse.Namespace) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{args.url}/server_info") as response:
        info = await response.json()
    jobs = make_jobs(args, args.vocab_size or int(info.get("vocab_size") or 1000))
    outcomes, seconds = await run(args, jobs)
    print(json.dumps(report(jobs, outcomes, seconds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--api-key")
    parser.add_argument("--num-requests", type=int, default=64)
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=int, default=0, help="closed loop: this many requests at any time")
    load.add_argument("--request-rate", type=float, default=0.0, help="open loop: Poisson arrivals per second (0: all at once)")
    parser.add_argument("--input-length", type=int, default=100)
    parser.add_argument("--output-length", type=int, default=100)
    parser.add_argument("--length-spread", type=float, default=0.0, help="0.5: lengths vary by up to half")
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--time-scale", type=float, default=1.0, help="stretches the dataset's arrival times")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(main_async(parser.parse_args()))


if __name__ == "__main__":
    main()
