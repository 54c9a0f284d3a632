"""Two-batch overlap against the straight step: EP 2 on CPU over real gloo, with an emulated network that costs time but no CPU.

The physics: a straight step takes its computation plus its communication. Split in two micro-batches, the communication of one runs
under the computation of the other; no step is shorter than the longer of the two, or than its order of operations allows. What the
order can't hide is simulated: the operations of a split step in their order, with the computation they took, each message half as
long as in a straight step. The network's bandwidth is set so that a straight step waits for 35% of its time.

Timed are forwards of the real model runner on synthetic steps, straight and split in turn, on all ranks together; a step's time is
that of the slowest rank, its waits are the mean of the ranks. `hidden_share` is the part of the communication that nothing waited
for, of that which could be hidden at all. `worst_regret`: for step sizes from 2 tokens up, the choice of a calibration against the
better way as measured anew.

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
WAITING_SHARE = 0.35
MODEL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
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
"""As much computation per byte sent as makes gloo's own work, which is the CPU's, a small part of a step."""
CASES = (("prefill", 1024), ("decode", 256))
"""Forward mode and tokens per rank."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of the repeats of one rank, in turn straight and split."""

    straight: list[float]
    split: list[float]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Of one step, in seconds, a mean over ranks: computed; communication under way, message by message; waited for messages."""

    computed_s: float
    communication_s: float
    waited_s: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """Figures of one size on the emulated network. order_s: of a split step's communication, what its order can't hide."""

    mode: str
    num_tokens: int
    bytes_per_s: float
    times: Times
    straight: Anatomy
    split: Anatomy
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

    def traced(self, step: TimedStep, *, split: bool) -> tuple[float, Trace]:
        """Seconds of one step, and how it ran."""
        timeline = Timeline(rank=self._rank)
        self._runner.timeline = timeline
        with timeline.step(0):
            seconds = step.seconds(split=split)
        self._runner.timeline = None
        return seconds, timeline.trace()

    def mean(self, anatomies: list[Anatomy]) -> Anatomy:
        """Medians of the steps, the mean of the ranks. Collective."""
        fields = torch.tensor([[each.computed_s, each.communication_s, each.waited_s] for each in anatomies], dtype=torch.float64)
        middle = fields.median(dim=0).values / self._runner.parallel.world_size
        dist.all_reduce(middle, group=self._runner.parallel.world_group)
        computed_s, communication_s, waited_s = middle.tolist()
        return Anatomy(computed_s=computed_s, communication_s=communication_s, waited_s=waited_s)


def measure(rank: int, settings: EngineSettings, repeats: int) -> list[Case]:
    """Job for a RankPool."""
    torch.set_num_threads(1)
    measuring = Measuring(settings, rank)
    return [_case(measuring, mode, num_tokens, repeats) for mode, num_tokens in CASES]


def _case(measuring: Measuring, mode: str, num_tokens: int, repeats: int) -> Case:
    step = measuring.step(mode, num_tokens)
    bytes_per_s = _bandwidth(measuring, step)
    measuring.network(latency_s=LATENCY_S, bytes_per_s=bytes_per_s)
    for split in (False, True) * 2:
        step.seconds(split=split)
    seen = [measuring.traced(step, split=split) for _ in range(repeats) for split in (False, True)]
    measuring.no_network()
    seconds = measuring.slowest([each for each, _ in seen])
    straight, split = [trace for _, trace in seen[::2]], [trace for _, trace in seen[1::2]]
    orders = [unhidden_seconds(trace, _message_seconds(other)) for trace, other in zip(split, straight, strict=True)]
    return Case(
        mode=mode,
        num_tokens=num_tokens,
        bytes_per_s=bytes_per_s,
        times=Times(straight=seconds[::2], split=seconds[1::2]),
        straight=measuring.mean([anatomy(trace) for trace in straight]),
        split=measuring.mean([anatomy(trace) for trace in split]),
        order_s=median(measuring.slowest(orders)),
    )


def _bandwidth(measuring: Measuring, step: TimedStep) -> float:
    """With which a straight step waits for its share of the time; the same on all ranks. Each round mends the one before."""
    network = measuring.network(latency_s=0.0, bytes_per_s=math.inf)
    step.seconds(split=False)
    num_bytes = measuring.slowest([network.num_bytes])[0]
    transfer_s = 1e-6
    for _ in range(4):
        measuring.network(latency_s=LATENCY_S, bytes_per_s=num_bytes / transfer_s)
        step.seconds(split=False)
        seen = measuring.mean([anatomy(measuring.traced(step, split=False)[1]) for _ in range(9)])
        transfer_s += seen.computed_s * WAITING_SHARE / (1 - WAITING_SHARE) - seen.waited_s
        assert transfer_s > 0, (
            f"gloo alone makes a straight step wait for {seen.waited_s} s beside {seen.computed_s} s of computation"
        )
    return num_bytes / transfer_s


def anatomy(trace: Trace) -> Anatomy:
    """Of one step on one rank."""
    waits = union([span.interval for span in trace.row("wait")])
    operations = union([span.interval for span in trace.row("cpu")])
    waited = total(intersect(operations, waits))
    return Anatomy(
        computed_s=(total(operations) - waited) * 1e-9,
        communication_s=sum(span.duration_ns for span in trace.row("communication")) * 1e-9,
        waited_s=waited * 1e-9,
    )


Message = tuple[int | None, str]
"""Layer and name of a communication."""


def _message_seconds(straight: Trace) -> dict[Message, float]:
    """How long each message of a straight step took."""
    return {(span.layer, span.name): span.duration_ns * 1e-9 for span in straight.row("communication")}


def unhidden_seconds(split: Trace, messages: dict[Message, float]) -> float:
    """How much of a split step's communication its order of operations leaves without computation beside it.

    The recorded operations run again, in their order and with the computation they took; each message takes half as long as that of
    a straight step, one after another, from its submit on, and its wait ends no earlier.
    """
    waits = union([span.interval for span in split.row("wait")])
    now = computed_s = link_free_at = 0.0
    arrives: dict[tuple[int | None, int | None, str], float] = {}
    for operation in split.row("cpu"):
        name, _, half = operation.name.rpartition("_")
        place = (operation.layer, operation.micro_batch, name)
        if half == "b" and place in arrives:
            now = max(now, arrives[place])
        waited = total(intersect([operation.interval], waits))
        seconds = (operation.duration_ns - waited) * 1e-9
        now, computed_s = now + seconds, computed_s + seconds
        if half == "a" and (operation.layer, name) in messages:
            link_free_at = max(now, link_free_at) + messages[operation.layer, name] / 2
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
            num_pages=8448,
            context_length=1024,
            chunk_tokens=1024,
            max_running=256,
            cap=512,
        )
        cases: list[Case] = pool.run(EP, measure, settings, repeats, deadline_s=300)[0]
        slow = min(case.bytes_per_s for case in cases)
        choices: list[Choice] = pool.run(EP, choose, settings, slow, 32 if args.quick else 128, 3 * repeats, deadline_s=500)[0]
        pool.close()
    console = Console()
    console.print(_case_table(cases))
    for choice in choices:
        console.print(_choice_table(choice))
    print(json.dumps(figures(cases, choices)))


def hidden_share(case: Case) -> float:
    """Of what the order can hide."""
    all_s = case.straight.communication_s
    return (all_s - case.split.waited_s) / (all_s - case.order_s)


def speedup(case: Case) -> float:
    return median(case.times.straight) / median(case.times.split)


def bound_s(case: Case) -> float:
    """The split step at best: its computation and what its order can't hide, and never less than the communication."""
    return max(case.split.computed_s + case.order_s, case.straight.communication_s)


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
    columns = ("mode", "tokens/rank", "MB/s", "straight", "of it waiting", "split", "of it waiting", "its order needs", "bound")
    for column in (*columns, "speedup", "hidden"):
        table.add_column(column, justify="right")
    for case in cases:
        straight_s, split_s = median(case.times.straight), median(case.times.split)
        times = (straight_s, case.straight.waited_s, split_s, case.split.waited_s, case.order_s, bound_s(case))
        table.add_row(
            case.mode,
            str(case.num_tokens),
            f"{case.bytes_per_s / 1e6:.1f}",
            *(f"{each * 1e3:.1f}" for each in times),
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
