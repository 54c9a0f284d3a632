"""What recording expert load costs a decode step of the demo model: on and off by turns, in one run of the real engine.

A sample is 16 steps with and 16 without recording: four at a stretch, in the order off on on off on off off on, so that what drifts
(contexts grow, other work on the machine comes and goes) falls on both alike, and a window of the recorder closes once. Each
sample gives one paired ratio. Shown is their median, with its 95% confidence interval from the ratios' order alone (the binomial
distribution of how many lie above the median), whatever their distribution.

The floor: a call per sparse layer, and a scatter-add every so many choices.

Usage: python benchmarks/bench_recorder.py [--requests 1 16 128] [--modes stat] [--samples 96]
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
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from engine_jobs import EngineSettings, greedy_request, make_engine

from moesaic.launch.demo import CHECKPOINT_DIR
from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.recording import LoadRecording, RecordingSettings

PATTERN = (False, True, True, False, True, False, False, True)
STRETCH = 4
SAMPLES_PER_ROUND = 8
WARM_UP_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Share:
    """Recording's part of a step's time over that of a step without it: the median of the samples and its 95% interval."""

    share: float
    low: float
    high: float


class Alternation:
    """An engine with as many decoding requests as told, whose steps are recorded or not as told."""

    def __init__(self, mode: str, num_requests: int) -> None:
        settings = RecordingSettings(mode=mode)  # type: ignore[arg-type]
        self._engine = make_engine(
            EngineSettings(
                model_path=str(CHECKPOINT_DIR),
                mode="normal",
                page_size=16,
                num_pages=32 * num_requests,
                max_running=num_requests,
                context_length=512,
                chunk_tokens=4096,
                prefix_cache=False,
                overlap_schedule=False,  # as the server resolves it for one CPU rank
                recording=settings,
            )
        )
        runner = self._engine.runner
        self._recordings = {on: LoadRecording(settings, runner.model_config, runner.parallel) for on in (False, True)}
        self._recordings[True].carry_out("start_record")
        self._num_requests = num_requests
        self._rids = itertools.count()

    def round(self) -> list[tuple[float, float]]:
        """Seconds without and with recording of each of some samples, by requests of their own."""
        num_steps = WARM_UP_STEPS + SAMPLES_PER_ROUND * len(PATTERN) * STRETCH
        for rid in itertools.islice(self._rids, self._num_requests):
            self._engine.apply(greedy_request(rid, [(rid * 31 + i * 17) % 4000 + 3 for i in range(8)], num_steps + 1))
        for _ in range(WARM_UP_STEPS):
            self._engine.step()
        samples = [self._sample() for _ in range(SAMPLES_PER_ROUND)]
        assert self._engine.scheduler.num_running == self._num_requests, "a request ended among the timed steps"
        _finish(self._engine)
        return samples

    def _sample(self) -> tuple[float, float]:
        seconds = {False: 0.0, True: 0.0}
        for on in PATTERN:
            # Not by command: start_record forgets what was counted, so no window would ever close.
            self._engine._recording = self._recordings[on]
            start = time.perf_counter()
            for _ in range(STRETCH):
                self._engine.step()
            seconds[on] += time.perf_counter() - start
        return seconds[False], seconds[True]


def _finish(engine: RankEngine) -> None:
    while not engine.step().step.quiet:
        pass


def median_share(seconds: NDArray[np.float64]) -> Share:
    """Of samples' seconds without and with recording, float64 [N, 2]."""
    shares = np.sort(seconds[:, 1] / seconds[:, 0] - 1)
    rank = max(0, int(len(shares) / 2 - 0.98 * len(shares) ** 0.5))
    return Share(share=float(np.median(shares)), low=float(shares[rank]), high=float(shares[-1 - rank]))


def measure(mode: str, num_requests: int, num_samples: int) -> tuple[Share, float]:
    """The share, and milliseconds of a step without recording (median)."""
    alternation = Alternation(mode, num_requests)
    alternation.round()
    rounds = [alternation.round() for _ in range(-(-num_samples // SAMPLES_PER_ROUND))]
    seconds = np.array(list(itertools.chain.from_iterable(rounds)))
    return median_share(seconds), float(np.median(seconds[:, 0])) / (len(PATTERN) / 2 * STRETCH) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--modes", nargs="+", choices=("stat", "per_pass", "per_token"), default=["stat"])
    parser.add_argument("--samples", type=int, default=480)
    args = parser.parse_args()
    torch.set_num_threads(2)
    table = Table(title=f"recording's part of a decode step, {args.samples} paired samples each")
    for column in ("mode", "requests", "step without, ms", "recording, us", "share", "95% interval"):
        table.add_column(column, justify="right")
    points = []
    for mode, num_requests in itertools.product(args.modes, args.requests):
        share, step_ms = measure(mode, num_requests, args.samples)
        interval = f"{share.low:+.2%} to {share.high:+.2%}"
        us = f"{share.share * step_ms * 1e3:.0f}"
        table.add_row(mode, str(num_requests), f"{step_ms:.2f}", us, f"{share.share:+.2%}", interval)
        figures = {name: round(value, 5) for name, value in vars(share).items()}
        points.append({"mode": mode, "requests": num_requests, "step_ms": round(step_ms, 3), **figures})
    Console().print(table)
    worst = max(points, key=lambda point: point["share"])
    headline = {"recorder_share": worst["share"], "recorder_share_low": worst["low"], "recorder_share_high": worst["high"]}
    print(json.dumps({**headline, "points": points}))


if __name__ == "__main__":
    main()
