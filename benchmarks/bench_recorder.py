"""What recording expert load costs a decode step: windows with and without it alternate in one run of the real engine.

Usage: python benchmarks/bench_recorder.py [--requests 64]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from bench_vs_transformers import MODEL
from engine_jobs import EngineSettings, greedy_request, make_engine
from tiny_models import make_tiny_model

from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.messages import Control
from moesaic.launch.engine.recording import RecordingSettings

WINDOWS, STEPS = 12, 20


def window(engine: RankEngine) -> list[float]:
    """Seconds of each of STEPS steps."""
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(2)
    table = Table(title=f"decode step with {args.requests} requests, {MODEL['num_hidden_layers'] - 1} sparse layers")
    for column in ("mode", "off, median ms", "on, median ms", "overhead"):
        table.add_column(column, justify="right")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder), "plain", **MODEL)
        for mode in ("stat", "per_pass", "per_token"):
            settings = EngineSettings(
                model_path=str(model.folder),
                mode="normal",
                page_size=16,
                num_pages=4096,
                max_running=args.requests,
                context_length=1024,
                chunk_tokens=2048,
                recording=RecordingSettings(mode=mode),  # type: ignore[arg-type]
            )
            engine = make_engine(settings)
            for rid in range(args.requests):
                engine.apply(greedy_request(rid, [rid + 2, 5, 9], 3 * WINDOWS * STEPS))
            window(engine)
            off: list[float] = []
            on: list[float] = []
            for number in range(1, 2 * WINDOWS, 2):
                # Off, on, on, off, ...: contexts grow from step to step, which must not count for one side.
                first, second = ("stop_record", "start_record") if number % 4 == 1 else ("start_record", "stop_record")
                for control_id, command in ((number, first), (number + 1, second)):
                    engine.control(Control(control_id=control_id, command=command))  # type: ignore[arg-type]
                    engine.step()
                    (on if command == "start_record" else off).extend(window(engine))
            share = float(np.median(on) / np.median(off)) - 1
            figures[f"overhead_{mode}"] = round(share, 4)
            table.add_row(mode, f"{np.median(off) * 1e3:.2f}", f"{np.median(on) * 1e3:.2f}", f"{share:+.1%}")
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
