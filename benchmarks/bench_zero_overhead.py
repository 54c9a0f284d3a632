"""What the engine costs beside the model: time per decode step that no forward covers, with and without overlapped scheduling.

One rank of the demo model with a number of decoding requests, on one thread, so that the CPU has room for a second. Two engines,
one that schedules each step while the one before it runs and one that does all in turn, take windows by turns in one run. A step
is everything up to the encoded message for clients. The floor is the forward itself (with sampling), as the engine that does all in
turn takes for it: a step can't be shorter.

    gap        share of the time of the steps in which no forward runs: scheduling, batches, results, messages, waking a thread
    slower     by how much the forward itself is slowed down by what runs beside it (Python's lock, memory bandwidth)
    overhead   step time above the floor, over the floor: what the two come to together

Usage: python benchmarks/bench_zero_overhead.py [--windows 8]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from engine_jobs import EngineSettings, greedy_request, make_engine

from moesaic.launch.demo import CHECKPOINT_DIR
from moesaic.launch.engine.messages import StepOutputs, encoder
from moesaic.launch.engine.step_job import StepJob, StepOutcome

REQUESTS = (1, 16, 128, 256)
STEPS = 40
WARM_UP_STEPS = 6


@dataclass(frozen=True)
class Window:
    """Seconds per step, and of them the forwards'."""

    step_s: float
    forward_s: float


class Serving:
    """An engine with as many decoding requests as told, all the time."""

    def __init__(self, num_requests: int, *, overlap_schedule: bool) -> None:
        self._engine = make_engine(
            EngineSettings(
                model_path=str(CHECKPOINT_DIR),
                mode="normal",
                page_size=16,
                num_pages=16 * num_requests,
                max_running=num_requests,
                context_length=256,
                chunk_tokens=4096,
                prefix_cache=False,
                overlap_schedule=overlap_schedule,
            )
        )
        self._num_requests = num_requests
        self._rids = itertools.count()
        self._forward_s = 0.0
        runner = self._engine._pipeline._runner
        run = runner.run

        def timed(job: StepJob) -> StepOutcome:
            start = time.perf_counter()
            outcome = run(job)
            self._forward_s += time.perf_counter() - start
            return outcome

        runner.run = timed  # type: ignore[method-assign]

    def window(self) -> Window:
        """Of requests of its own: prompts and first steps aren't timed."""
        for rid in itertools.islice(self._rids, self._num_requests):
            prompt = [(rid * 31 + i * 17) % 4000 + 3 for i in range(32)]
            self._engine.apply(greedy_request(rid, prompt, WARM_UP_STEPS + STEPS + 8))
        for _ in range(WARM_UP_STEPS):
            self._step()
        start, forward_s = time.perf_counter(), self._forward_s
        for _ in range(STEPS):
            assert self._step() == self._num_requests, "a request ended among the timed steps"
        window = Window((time.perf_counter() - start) / STEPS, (self._forward_s - forward_s) / STEPS)
        while not self._engine.step().step.quiet:
            pass
        return window

    def _step(self) -> int:
        """Number of tokens that went out."""
        result = self._engine.step()
        outputs = StepOutputs(dp_rank=0, outputs=result.outputs, rids=result.rids, tokens=result.tokens, load=self._engine.load(0))
        encoder.encode(outputs)
        return len(result.outputs) + len(result.rids)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Medians over windows; overlapped and plain: Window of medians."""

    overlapped: Window
    plain: Window

    @property
    def gap_share(self) -> float:
        return 1 - self.overlapped.forward_s / self.overlapped.step_s

    @property
    def plain_gap_share(self) -> float:
        return 1 - self.plain.forward_s / self.plain.step_s

    @property
    def slower(self) -> float:
        return self.overlapped.forward_s / self.plain.forward_s - 1

    @property
    def overhead(self) -> float:
        return self.overlapped.step_s / self.plain.forward_s - 1

    @property
    def speedup(self) -> float:
        return self.plain.step_s / self.overlapped.step_s


def compare(num_requests: int, windows: int) -> Compared:
    serving = {overlap: Serving(num_requests, overlap_schedule=overlap) for overlap in (True, False)}
    seen: dict[bool, list[Window]] = {True: [], False: []}
    for number in range(windows + 1):
        for overlap in (True, False) if number % 2 else (False, True):
            seen[overlap].append(serving[overlap].window())
    overlapped, plain = (
        Window(*(float(np.median([getattr(window, name) for window in seen[overlap][1:]])) for name in ("step_s", "forward_s")))
        for overlap in (True, False)
    )
    return Compared(overlapped=overlapped, plain=plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="decode steps of the demo model on one rank: overlapped scheduling and step after step")
    for column in ("requests", "forward ms", "step ms", "gap", "step ms, overlapped", "gap", "slower", "overhead", "tok/s", "gain"):
        table.add_column(column, justify="right")
    figures: dict[str, float] = {}
    for num_requests in REQUESTS:
        found = compare(num_requests, args.windows)
        plain, overlapped = found.plain, found.overlapped
        table.add_row(
            str(num_requests),
            f"{plain.forward_s * 1e3:.2f}",
            f"{plain.step_s * 1e3:.2f}",
            f"{found.plain_gap_share:.1%}",
            f"{overlapped.step_s * 1e3:.2f}",
            f"{found.gap_share:.1%}",
            f"{found.slower:+.1%}",
            f"{found.overhead:+.1%}",
            f"{num_requests / overlapped.step_s:.0f}",
            f"{found.speedup:.3f}x",
        )
        for name in ("gap_share", "plain_gap_share", "overhead", "speedup"):
            figures[f"{name}_{num_requests}"] = round(getattr(found, name), 4)
    Console().print(table)
    print(json.dumps({"gap_share": figures["gap_share_128"], **figures}))


if __name__ == "__main__":
    main()
