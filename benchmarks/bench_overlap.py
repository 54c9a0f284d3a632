"""Two-batch overlap against the straight step: EP 2 on CPU over real gloo, with an emulated network that costs time but no CPU.

The physics: a straight step takes its computation plus its communication. Split in two micro-batches, the communication of one runs
under the computation of the other; no step is shorter than the longer of the two, or than its order of operations allows. What the
order can't hide is simulated: the operations as recorded on a free network, in the order of the schedule, with the network's times
for what they submit. The network's bandwidth is set so that communication is 35% of a straight step.

Timed are forwards of the real model runner on synthetic steps, straight and split in turn, on all ranks together; a time is that of
the slowest rank. `hidden_share` is the hidden part of the communication that could be hidden at all. `worst_regret`: for step sizes
from 2 tokens up, the choice of a calibration against the better way as measured anew.

Usage: python benchmarks/bench_overlap.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from emulated_network import EmulatedNetwork
from engine_jobs import EngineSettings, make_engine
from rank_pool import RankPool
from tiny_models import make_tiny_model

from moesaic.launch.engine.calibration import Calibration, TimedStep
from moesaic.launch.engine.step import SplitThresholds, StepRules
from moesaic.overlap.calibration import Measurement, counts_to_measure, split_threshold, summarise, worst_regret
from moesaic.overlap.intervals import intersect, total, union
from moesaic.overlap.timeline import Timeline
from moesaic.overlap.trace import Trace

EP = 2
LATENCY_S = 100e-6
COMMUNICATION_SHARE = 0.35
MODEL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 32,
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
CASES = (("prefill", 512), ("decode", 128))
"""Forward mode and tokens per rank."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of the repeats of one rank, in turn straight and split."""

    straight: list[float]
    split: list[float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One rank's figures of one size: times on a free and on the emulated network, and what the network was.

    network_s: seconds that the network adds to a straight and to a split step. order_s: how much of the latter the order of the
    operations can't hide, by simulation.
    """

    mode: str
    num_tokens: int
    bytes_per_s: float
    network_s: tuple[float, float]
    free: Times
    emulated: Times
    order_s: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a calibration chose on the emulated network, and the same sizes measured anew."""

    mode: str
    threshold: int | None
    again: tuple[Measurement, ...]


class Measuring:
    """One rank's runner with its network."""

    def __init__(self, settings: EngineSettings, rank: int) -> None:
        engine = make_engine(settings, rank)
        self._runner = engine.runner
        rules = StepRules(attn_tp_size=1, a2a=True, mode="auto", cap=settings.cap, split_from=SplitThresholds())
        self._calibration = Calibration(engine.runner, rules, engine.scheduler.config)
        self._rank = rank

    def network(self, *, latency_s: float, bytes_per_s: float) -> EmulatedNetwork:
        """Messages take this from now on."""
        network = EmulatedNetwork(latency_s=latency_s, bytes_per_s=bytes_per_s)
        self._runner.watch_communications(network)
        return network

    def no_network(self) -> None:
        self._runner.watch_communications(None)

    def step(self, mode: str, num_tokens: int) -> TimedStep:
        return self._calibration.timed_step(mode, num_tokens)

    def times(self, step: TimedStep, repeats: int) -> Times:
        """After two of each to warm up. On every rank those of the slowest."""
        for split in (False, True) * 2:
            step.seconds(split=split)
        seconds = self.slowest([step.seconds(split=split) for _ in range(repeats) for split in (False, True)])
        return Times(straight=seconds[::2], split=seconds[1::2])

    def slowest(self, seconds: list[float]) -> list[float]:
        """Each on the rank where it was longest. Collective."""
        longest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self._runner.parallel.world_group)
        times: list[float] = longest.tolist()
        return times

    def trace(self, step: TimedStep, *, split: bool) -> Trace:
        """One step as it ran."""
        timeline = Timeline(rank=self._rank)
        self._runner.timeline = timeline
        with timeline.step(0):
            step.seconds(split=split)
        self._runner.timeline = None
        return timeline.trace()


def measure(rank: int, settings: EngineSettings, repeats: int) -> list[Case]:
    """Job for a RankPool."""
    torch.set_num_threads(1)
    measuring = Measuring(settings, rank)
    return [_case(measuring, mode, num_tokens, repeats) for mode, num_tokens in CASES]


def _case(measuring: Measuring, mode: str, num_tokens: int, repeats: int) -> Case:
    step = measuring.step(mode, num_tokens)
    measuring.no_network()
    free = measuring.times(step, repeats)
    traces = [measuring.trace(step, split=True) for _ in range(5)]
    bytes_per_s = _bandwidth(measuring, step, median(free.straight))
    network_s = tuple(_network_seconds(measuring, step, bytes_per_s, split=split) for split in (False, True))
    measuring.network(latency_s=LATENCY_S, bytes_per_s=bytes_per_s)
    emulated = measuring.times(step, repeats)
    measuring.no_network()
    return Case(
        mode=mode,
        num_tokens=num_tokens,
        bytes_per_s=bytes_per_s,
        network_s=(network_s[0], network_s[1]),
        free=free,
        emulated=emulated,
        order_s=median(measuring.slowest([unhidden_seconds(trace, network_s[1]) for trace in traces])),
    )


def _network_seconds(measuring: Measuring, step: TimedStep, bytes_per_s: float, *, split: bool) -> float:
    """What this network adds to one step, one message after another."""
    network = measuring.network(latency_s=LATENCY_S, bytes_per_s=bytes_per_s)
    step.seconds(split=split)
    return measuring.slowest([network.seconds])[0]


def _bandwidth(measuring: Measuring, step: TimedStep, computation_s: float) -> float:
    """With which communication is its share of a straight step; the same on all ranks."""
    network = measuring.network(latency_s=0.0, bytes_per_s=math.inf)
    step.seconds(split=False)
    num_bytes, num_messages = measuring.slowest([network.num_bytes, network.num_messages])
    transfer_s = computation_s * COMMUNICATION_SHARE / (1 - COMMUNICATION_SHARE) - num_messages * LATENCY_S
    assert transfer_s > 0, f"{num_messages:.0f} messages of {LATENCY_S} s take longer than the share of {computation_s} s"
    return num_bytes / transfer_s


def unhidden_seconds(trace: Trace, network_s: float) -> float:
    """How much of the network's time in a split step the order of its operations leaves without computation beside it.

    The recorded operations run again, in their order and with the computation they took; each communication takes an equal part of
    `network_s`, one after another, from its submit on, and its wait ends no earlier.
    """
    operations = trace.row("cpu")
    each_s = network_s / sum(operation.name.endswith("_a") for operation in operations)
    waits = [span.interval for span in trace.row("wait")]
    now = computed_s = link_free_at = 0.0
    arrives: dict[tuple[int | None, int | None, str], float] = {}
    for operation in operations:
        kind, _, half = operation.name.rpartition("_")
        place = (operation.layer, operation.micro_batch, kind)
        if half == "b":
            now = max(now, arrives[place])
        waited = total(intersect([operation.interval], union(waits)))
        seconds = (operation.duration_ns - waited) * 1e-9
        now, computed_s = now + seconds, computed_s + seconds
        if half == "a":
            link_free_at = max(now, link_free_at) + each_s
            arrives[place] = link_free_at
    return now - computed_s


def choose(rank: int, settings: EngineSettings, bytes_per_s: float, most: int, repeats: int) -> list[Choice]:
    """Job for a RankPool: thresholds found on the emulated network, and all sizes measured again."""
    torch.set_num_threads(1)
    measuring = Measuring(settings, rank)
    measuring.network(latency_s=LATENCY_S, bytes_per_s=bytes_per_s)

    def points(mode: str) -> tuple[Measurement, ...]:
        found = []
        for count in counts_to_measure(most):
            times = measuring.times(measuring.step(mode, count), repeats)
            found.append(summarise(count, times.straight, times.split))
        return tuple(found)

    return [Choice(mode=mode, threshold=split_threshold(points(mode)), again=points(mode)) for mode, _ in CASES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, for a look")
    args = parser.parse_args()
    repeats = 3 if args.quick else 15
    pool = RankPool()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder), "plain", **MODEL)
        settings = EngineSettings(
            model_path=str(model.folder),
            tp=EP,
            dp=EP,
            ep=EP,
            a2a="torch",
            dp_lm_head=True,
            page_size=16,
            num_pages=2048,
            context_length=512,
            chunk_tokens=512,
            max_running=128,
            cap=512,
        )
        cases: list[Case] = pool.run(EP, measure, settings, repeats, deadline_s=300)[0]
        slow = min(case.bytes_per_s for case in cases)
        choices: list[Choice] = pool.run(EP, choose, settings, slow, 32 if args.quick else 128, repeats, deadline_s=300)[0]
        pool.close()
    console = Console()
    console.print(_case_table(cases))
    for choice in choices:
        console.print(_choice_table(choice))
    print(json.dumps(figures(cases, choices)))


def hidden_share(case: Case) -> float:
    """Of what the order can hide."""
    added_s = median(case.emulated.split) - median(case.free.split)
    network_s = case.network_s[1]
    return (network_s - added_s) / (network_s - case.order_s)


def speedup(case: Case) -> float:
    return median(case.emulated.straight) / median(case.emulated.split)


def bound_s(case: Case) -> float:
    """The split step at best: its computation and what its order can't hide, and never less than the network's time."""
    return max(median(case.free.split) + case.order_s, case.network_s[1])


def figures(cases: list[Case], choices: list[Choice]) -> dict[str, Any]:
    """The JSON line: of the two forward modes the worse."""
    return {
        "hidden_share": round(min(map(hidden_share, cases)), 3),
        "speedup": round(min(map(speedup, cases)), 3),
        "worst_regret": round(max(worst_regret(choice.again, choice.threshold) for choice in choices), 3),
        "modes": {case.mode: {"hidden_share": round(hidden_share(case), 3), "speedup": round(speedup(case), 3)} for case in cases},
    }


def _case_table(cases: list[Case]) -> Table:
    table = Table(title=f"EP {EP} over gloo, one thread a rank, network of {LATENCY_S * 1e6:.0f} us and so many MB/s; times in ms")
    columns = ("mode", "tokens/rank", "MB/s", "straight, no network", "split, no network", "communication", "straight", "split")
    for column in (*columns, "bound", "speedup", "hidden"):
        table.add_column(column, justify="right")
    for case in cases:
        times = (case.free.straight, case.free.split, [case.network_s[0]], case.emulated.straight, case.emulated.split)
        row = (f"{median(each) * 1e3:.1f}" for each in times)
        table.add_row(
            case.mode,
            str(case.num_tokens),
            f"{case.bytes_per_s / 1e6:.1f}",
            *row,
            f"{bound_s(case) * 1e3:.1f}",
            f"{speedup(case):.2f}",
            f"{hidden_share(case):.1%}",
        )
    return table


def _choice_table(choice: Choice) -> Table:
    wins = "never" if choice.threshold is None else f"from {choice.threshold} tokens on"
    table = Table(title=f"{choice.mode}: split {wins}; measured anew, in ms")
    for column in ("tokens/rank", "straight", "split", "chosen"):
        table.add_column(column, justify="right")
    for point in choice.again:
        split = choice.threshold is not None and point.num_tokens >= choice.threshold
        chosen = "split" if split else "straight"
        table.add_row(str(point.num_tokens), f"{point.straight_s * 1e3:.2f}", f"{point.split_s * 1e3:.2f}", chosen)
    return table


if __name__ == "__main__":
    main()
