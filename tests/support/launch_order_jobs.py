"""Two launch orders of the same operations, recorded on a network of known latency: the right one, and one that waits too early.

The network delays every message by a share of what a layer computes on this machine, so that how much the right order can hide, and
the wrong one must leave open, depends on the machine as little as possible.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.distributed as dist
from emulated_network import EmulatedNetwork
from engine_jobs import EngineSettings
from forward_jobs import ForwardCase, Forwards

from moesaic.launch.models.layers import SparseDecoderLayer
from moesaic.launch.models.operations import PREFILL, LayerOperations, SplitOrder, prefill_operations
from moesaic.overlap.operations import Operation, YieldOperation
from moesaic.overlap.stages import Strategy
from moesaic.overlap.timeline import Timeline
from moesaic.overlap.trace import Trace

LATENCY_SHARE = 0.15
"""Of the time in which half a batch is computed in one layer: a dispatch is two messages, a combine is one."""

_WAITS_FIRST = (
    *("attention_prepare", "attention_core", "gate", "dispatch_a", "dispatch_b", None),
    *("shared_expert", "experts", "combine_a", "combine_b", None),
    "output",
)


def waits_first_operations(layer: SparseDecoderLayer) -> LayerOperations:
    """The wrong order: the CPU waits for what it has just sent, and only then submits the other half's computation."""
    by_name = {each.name: each for each in prefill_operations(layer) if isinstance(each, Operation)}
    return [YieldOperation() if name is None else by_name[name] for name in _WAITS_FIRST]


WAITS_FIRST = SplitOrder(
    operations=waits_first_operations, strategy=Strategy(name="waits first", yields_per_layer=2, delta_stages=0)
)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One rank's traces of the same steps. latency_s: of every message."""

    latency_s: float
    right: Trace
    waits_first: Trace


def launch_order_job(rank: int, settings: EngineSettings, case: ForwardCase, num_steps: int) -> Recorded:
    """Job for a RankPool of all the settings' ranks."""
    forwards = Forwards(settings, rank)
    num_layers = forwards.runner.model_config.num_hidden_layers
    latency_s = _slowest(forwards, _step_seconds(forwards, replace(case, split=False))) / (2 * num_layers) * LATENCY_SHARE
    forwards.runner.watch_communications(EmulatedNetwork(latency_s=latency_s, bytes_per_s=math.inf))
    right, waits_first = (_record(forwards, case, order, rank, num_steps) for order in (PREFILL, WAITS_FIRST))
    return Recorded(latency_s=latency_s, right=right, waits_first=waits_first)


def _step_seconds(forwards: Forwards, case: ForwardCase) -> float:
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        forwards.run(case)
        seconds.append(time.perf_counter() - start)
    return median(seconds[2:])


def _slowest(forwards: Forwards, seconds: float) -> float:
    """The same on all ranks. Collective."""
    longest = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=forwards.runner.parallel.world_group)
    return float(longest)


def _record(forwards: Forwards, case: ForwardCase, order: SplitOrder, rank: int, num_steps: int) -> Trace:
    """The steps after two to warm up."""
    runner = forwards.runner
    runner.model.order_split_steps(prefill=order)
    for _ in range(2):
        forwards.run(case)
    timeline = Timeline(rank=rank)
    runner.timeline = timeline
    for step in range(num_steps):
        with timeline.step(step):
            forwards.run(case)
    runner.timeline = None
    return timeline.trace()
