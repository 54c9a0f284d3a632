"""The engine's own time per decode step: everything in a step but the model's forward.

A real RankEngine (scheduler, paged KV bookkeeping, batch building, sampling parameters, greedy sampling, outputs, their encoding as
messages) with a runner that returns prepared logits at once. The floor is Python: one visit of each running sequence to record its
token and write its output, about 1 us each.

Usage: python benchmarks/bench_scheduler.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from engine_jobs import greedy_request

from moesaic.launch.engine.activity import Activity
from moesaic.launch.engine.assembly import assemble_parts
from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.messages import StepOutputs, encoder
from moesaic.launch.engine.process_groups import EngineGroups
from moesaic.launch.engine.scheduler import Scheduler, SchedulerConfig
from moesaic.launch.engine.step import StepRules

VOCAB = 2048
LOGITS = 64
"""Columns of the prepared logits: looking through a real vocabulary is the device's work, not the engine's."""
PAGE_SIZE = 16
STEPS = 200


@dataclass
class PreparedLogits:
    """Stands where the model runner would: logits of the right shape without computing them."""

    logits: torch.Tensor
    config: Any
    parallel: Any
    timeline: Any = None

    def forward(self, inputs: Any, observer: Any, split: Any, graph: Any) -> torch.Tensor:
        return self.logits[: len(inputs.logit_rows)]

    def verify(self) -> None:
        pass


class NoRecording:
    dp_rank = 0
    observer = None

    def end_step(self, num_tokens: int, forward_mode: str, positions: torch.Tensor) -> None:
        pass


def make_engine(num_requests: int) -> RankEngine:
    config = SchedulerConfig(
        num_pages=num_requests * 128, page_size=PAGE_SIZE, max_running=num_requests, context_length=2048, chunk_tokens=1 << 20
    )
    recording: Any = NoRecording()
    parallel: Any = SimpleNamespace(rank=0, world_size=1, dp_rank=0, attn_tp_size=1)
    runner: Any = PreparedLogits(torch.randn(num_requests, LOGITS), SimpleNamespace(page_size=PAGE_SIZE, device="cpu"), parallel)
    return assemble_parts(
        scheduler=Scheduler(config),
        runner=runner,
        recording=recording,
        rebalancing=None,
        rules=StepRules(attn_tp_size=1, a2a=False, mode="auto", cap=1 << 20),
        activity=Activity(0),
        parallel=parallel,
        groups=EngineGroups(),
        overlap_schedule=False,
    )


def step_ms(num_requests: int) -> float:
    """Median milliseconds of a step in which `num_requests` sequences of about 1,000 tokens decode."""
    engine = make_engine(num_requests)
    for rid in range(num_requests):
        prompt = [(rid * 7919 + i) % VOCAB for i in range(1000 + rid % 16)]
        engine.apply(greedy_request(rid, prompt, STEPS + 100))
    engine.step()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        result = engine.step()
        outputs = StepOutputs(dp_rank=0, outputs=result.outputs, rids=result.rids, tokens=result.tokens, load=engine.load(0))
        encoder.encode(outputs)
        times.append(time.perf_counter() - start)
        assert len(result.outputs) + len(result.rids) == num_requests
    return statistics.median(times) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    table = Table(title="engine time per decode step, without the model (median)")
    for column in ("running requests", "ms per step", "us per request"):
        table.add_column(column, justify="right")
    result = {}
    for num_requests in (1, 16, 64, 256, 1024):
        milliseconds = step_ms(num_requests)
        result[f"step_ms_{num_requests}"] = round(milliseconds, 4)
        table.add_row(str(num_requests), f"{milliseconds:.3f}", f"{milliseconds / num_requests * 1e3:.2f}")
    Console().print(table)
    cache = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("bench_prefix_cache.py"))], capture_output=True, text=True, check=True
    )
    lines = cache.stdout.strip().splitlines()
    print("\n".join(lines[:-1]))
    print(json.dumps({**result, **json.loads(lines[-1])}))


if __name__ == "__main__":
    main()
