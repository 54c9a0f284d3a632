"""What a rebalance costs those who are being served: step times with EP 4 on CPU while experts move, and while they don't.

Four ranks over gloo run a closed loop of decoding requests. Windows of plain steps alternate with rebalance cycles, in one run, so
that a drift of the machine meets both. The policy is DeepSeek's greedy, which solves from nothing and so moves most slots for a
little noise in the load: the worst case of movement. Compared are rank 0's step times.

Usage: python benchmarks/bench_rebalance.py [--cycles 12]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from bench_vs_transformers import MODEL
from engine_jobs import EngineSettings, greedy_request, make_engine
from rank_pool import RankPool
from tiny_models import make_tiny_model

from moesaic.eplb.config import RebalanceConfig
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.settings import RebalanceSettings, SlotOptions
from moesaic.launch.engine.messages import Control

EP = 4
NUM_SLOTS = 72
PLAIN_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One rank's step times in seconds, those of plain windows and those of cycles; seconds and bytes received of each cycle."""

    plain: list[float]
    moving: list[float]
    cycle_s: list[float]
    cycle_bytes: list[int]
    committed: int


def serve(rank: int, settings: EngineSettings, requests_per_rank: int, cycles: int, new_tokens: int) -> Measured:
    """Job for a RankPool."""
    torch.set_num_threads(1)
    engine = make_engine(settings, rank)
    status = engine.activity.rebalance_status
    assert status is not None, "the settings rebalance"
    rids = itertools.count(rank * 1_000_000)

    def step() -> float:
        """Seconds of one step with as many requests as ever."""
        while engine.scheduler.num_running + engine.scheduler.num_waiting < requests_per_rank:
            rid = next(rids)
            engine.apply(greedy_request(rid, [(rid * 31 + i * 17) % 2000 + 2 for i in range(8)], new_tokens))
        start = time.perf_counter()
        engine.step()
        return time.perf_counter() - start

    plain: list[float] = []
    moving: list[float] = []
    cycle_s: list[float] = []
    cycle_bytes: list[int] = []
    for cycle in range(1, cycles + 1):
        window = [step() for _ in range(PLAIN_STEPS)]
        plain += window if cycle > 1 else []  # the first is warm-up
        engine.control(Control(control_id=cycle, command="rebalance"))
        received, start = status().bytes_moved, time.perf_counter()
        steps = [step()]
        while status().cycle < cycle or status().phase != "idle":
            steps.append(step())
        moving += steps
        cycle_s.append(time.perf_counter() - start)
        cycle_bytes.append(status().bytes_moved - received)
    last = status()
    return Measured(plain=plain, moving=moving, cycle_s=cycle_s, cycle_bytes=cycle_bytes, committed=last.committed_cycles)


def percentile(seconds: list[float], share: float) -> float:
    """In milliseconds."""
    return float(np.quantile(seconds, share)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=12)
    parser.add_argument("--requests-per-rank", type=int, default=8)
    args = parser.parse_args()
    pool = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder), "plain", **MODEL)
        location = ExpertLocation.trivial(
            num_layers=MODEL["num_hidden_layers"] - MODEL["first_k_dense_replace"],
            num_experts=MODEL["n_routed_experts"],
            num_slots=NUM_SLOTS,
            ep_size=EP,
        )
        settings = EngineSettings(
            model_path=str(model.folder),
            tp=EP,
            dp=EP,
            ep=EP,
            a2a="torch",
            page_size=16,
            num_pages=512,
            context_length=256,
            prefix_cache=False,
            slots=SlotOptions(location=location, movable=True),
            rebalance=RebalanceSettings(
                # Only on demand, and always worth it.
                config=RebalanceConfig(num_iterations=1 << 40, horizon_steps=1 << 40),
                algorithm="deepseek",
            ),
        )
        results = pool.run(EP, serve, settings, args.requests_per_rank, args.cycles, 32, deadline_s=600)
        pool.close()
    show(results)


def show(results: list[Measured]) -> None:
    first = results[0]
    table = Table(title=f"rank 0's steps, EP {EP} on CPU, {len(first.cycle_s)} cycles")
    for column in ("", "steps", "median ms", "p90 ms", "p99 ms", "max ms"):
        table.add_column(column, justify="right")
    for name, times in (("no rebalance", first.plain), ("during a rebalance", first.moving)):
        table.add_row(name, str(len(times)), *(f"{percentile(times, share):.1f}" for share in (0.5, 0.9, 0.99, 1.0)))
    console = Console()
    console.print(table)
    received = [sum(rank.cycle_bytes[i] for rank in results) for i in range(len(first.cycle_s))]
    console.print(
        f"a cycle: {np.median(first.cycle_s):.2f} s, {np.median(received) / 2**20:.1f} MiB received by all ranks together; "
        f"{first.committed} of {len(first.cycle_s)} cycles moved experts",
        highlight=False,
    )
    figures: dict[str, Any] = {
        "p99_ratio": round(percentile(first.moving, 0.99) / percentile(first.plain, 0.99), 2),
        "max_ratio": round(max(first.moving) / max(first.plain), 2),
        "max_over_median": round(max(first.moving) / float(np.median(first.plain)), 2),
        "median_ratio": round(float(np.median(first.moving) / np.median(first.plain)), 2),
        "cycle_s": round(float(np.median(first.cycle_s)), 3),
        "bytes": sum(received),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
