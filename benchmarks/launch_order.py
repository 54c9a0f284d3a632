"""Draws why the order of launches matters: the same prefill step as two micro-batches, with computation submitted before the waits,
and with every communication waited for at once. Writes benchmarks/results/launch-order.png, which README shows.

The demo model on two ranks (EP 2, real gloo on CPU), on an emulated network that delays every message by a stated share of what a
layer computes and uses no CPU (see tests/support/launch_order_jobs.py). Figures are of all recorded steps of both ranks. Drawn is
rank 0 in the fastest step of each order, where the machine itself was in the way least, from the same layer on, at the same scale.

Usage: python benchmarks/launch_order.py [--png FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from engine_jobs import EngineSettings
from forward_jobs import ForwardCase
from launch_order_jobs import Recorded, launch_order_job
from rank_pool import RankPool

from moesaic.launch.demo import CHECKPOINT_DIR
from moesaic.overlap.timeline_figures import hidden_share, idle_share, step_times_ns
from moesaic.overlap.timeline_picture import Picture, detail_picture, whole_picture
from moesaic.overlap.timeline_png import save_timeline_png
from moesaic.overlap.trace import Trace, merge

NUM_TOKENS, NUM_STEPS = 448, 9
PNG = Path(__file__).parent / "results" / "launch-order.png"


@dataclass(frozen=True, kw_only=True)
class Order:
    """An order's recording, of both ranks, and its figures."""

    name: str
    trace: Trace

    @property
    def hidden(self) -> float:
        return hidden_share(self.trace) or 0.0

    @property
    def idle(self) -> float:
        return idle_share(self.trace) or 0.0

    @property
    def step_ms(self) -> float:
        times = sorted(step_times_ns(self.trace).values())
        return times[len(times) // 2] / 1e6

    def picture(self) -> Picture:
        """Rank 0 in the fastest step; the window is that of the two layers in the middle."""
        times = step_times_ns(self.trace)
        drawn = self.trace.only(rank=0, step=min(times, key=lambda step: times[step]))
        close = detail_picture(drawn)
        assert close is not None, "the demo model has more layers than are drawn"
        title = f"{self.name}: {self.hidden:.0%} of communication hidden, computation row idle {self.idle:.0%}"
        return replace(whole_picture(drawn), title=f"{title}, step {self.step_ms:.1f} ms", window_us=close.window_us)


def same_scale(pictures: Iterable[Picture]) -> list[Picture]:
    """As much time in each as the longest shows."""
    every = list(pictures)
    longest = max(end - start for start, end in (picture.window_us for picture in every))
    return [replace(picture, window_us=(picture.window_us[0], picture.window_us[0] + longest)) for picture in every]


def record() -> tuple[float, list[Order]]:
    """Seconds that every message takes longer, and the orders."""
    settings = EngineSettings(
        model_path=str(CHECKPOINT_DIR),
        tp=2,
        dp=2,
        ep=2,
        a2a="torch",
        dp_lm_head=True,
        cap=512,
        page_size=16,
        num_pages=128,
        context_length=512,
    )
    pool = RankPool()
    try:
        case = ForwardCase(num_tokens=NUM_TOKENS, split=True)
        ranks: list[Recorded] = pool.run(2, launch_order_job, settings, case, NUM_STEPS, deadline_s=300)
    finally:
        pool.close()
    return ranks[0].latency_s, [
        Order(name="Compute first, then wait", trace=merge(rank.right for rank in ranks)),
        Order(name="Wait at once", trace=merge(rank.waits_first for rank in ranks)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, default=PNG, help="where to write the picture [%(default)s]")
    args = parser.parse_args()
    latency_s, orders = record()
    title = f"Two micro-batches, the same operations in two launch orders (network: {latency_s * 1e3:.1f} ms per message)"
    save_timeline_png(same_scale(order.picture() for order in orders), args.png, title=title)
    print(f"written: {args.png}")
    figures = {
        order.name: {"hidden": round(order.hidden, 3), "idle": round(order.idle, 3), "step_ms": round(order.step_ms, 2)}
        for order in orders
    }
    print(json.dumps({"latency_ms": round(latency_s * 1e3, 3), "num_tokens": NUM_TOKENS, "orders": figures}))


if __name__ == "__main__":
    main()
