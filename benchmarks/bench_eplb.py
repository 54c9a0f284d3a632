"""Expert placement: how long a solve takes, how balanced it is, and how much of it changes when the loads change a little.

58 sparse layers x 256 experts, every layer placed anew. Beside ours stands the greedy method (as DeepSeek's EPLB in its global
form: replicas to the largest load per replica, then heaviest piece to the least loaded GPU with room), written plainly, slot by
slot and layer by layer. The floor of the largest GPU load is the mean, or the largest replica where slots are few ("bound").
Balancedness is the mean over layers of mean / max GPU load, each expert's load split evenly over its replicas.
"worse layers": those in which ours is less balanced than the greedy method. "near home": share of the slots in the node in which
most of their expert group (of 8) lies, when ours is told of nodes of 8 GPUs; its time and balance then stand beside.
The noise case multiplies each load by 1 + 0.02 * a standard normal and solves again from the placement before.

Usage: python benchmarks/bench_eplb.py
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from moesaic.eplb import rebalance_experts
from moesaic.eplb.balancedness import balancedness, gpu_loads
from moesaic.eplb.bounds import replica_bound
from moesaic.eplb.location import ExpertLocation

NUM_LAYERS, NUM_EXPERTS, NUM_GROUPS, GPUS_PER_NODE = 58, 256, 8, 8
NOISE = 0.02
REPEATS = 9

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    loads: Floats
    num_slots: int
    num_gpus: int

    @property
    def num_nodes(self) -> int:
        """Of 8 GPUs each, but no more than there are expert groups."""
        return min(self.num_gpus // GPUS_PER_NODE, NUM_GROUPS)

    def balancedness(self, placed: Ints, loads: Floats | None = None) -> Floats:
        location = ExpertLocation(physical_to_logical=placed, num_experts=NUM_EXPERTS, ep_size=self.num_gpus)
        return balancedness(gpu_loads(location, self.loads if loads is None else loads))

    def solve(self, loads: Floats, *, num_nodes: int = 1, previous: Ints | None = None) -> Ints:
        num_groups = NUM_GROUPS if num_nodes > 1 else 1
        placed: Ints = rebalance_experts(loads, self.num_slots, num_groups, num_nodes, self.num_gpus, previous=previous)[0].numpy()
        return placed


def make_cases() -> list[Case]:
    rng = np.random.default_rng(0)
    lognormal = rng.lognormal(0, 1, (NUM_LAYERS, NUM_EXPERTS))
    zipf = rng.permuted(np.tile(1 / np.arange(1, NUM_EXPERTS + 1), (NUM_LAYERS, 1)), axis=1)
    hot = rng.lognormal(0, 1, (NUM_LAYERS, NUM_EXPERTS))
    layers, experts = np.arange(NUM_LAYERS), rng.integers(0, NUM_EXPERTS, NUM_LAYERS)
    hot[layers, experts] = 0
    hot[layers, experts] = hot.sum(axis=1) / 4
    return [
        Case(name="lognormal(0,1)", loads=lognormal, num_slots=288, num_gpus=32),
        Case(name="Zipf 1.0", loads=zipf, num_slots=288, num_gpus=32),
        Case(name="one expert 20%", loads=hot, num_slots=288, num_gpus=32),
        Case(name="lognormal(0,1)", loads=lognormal, num_slots=320, num_gpus=64),
        Case(name="lognormal(0,1)", loads=lognormal, num_slots=288, num_gpus=144),
    ]


def greedy_layer(load: list[float], num_slots: int, num_gpus: int) -> list[int]:
    """The greedy method for one layer, in plain Python: the expert of every slot."""
    num_experts, capacity = len(load), num_slots // num_gpus
    replicas = [1] * num_experts
    for _ in range(num_slots - num_experts):
        replicas[max(range(num_experts), key=lambda expert: load[expert] / replicas[expert])] += 1
    pieces = [(load[expert] / number, expert) for expert, number in enumerate(replicas) for _ in range(number)]
    held: list[list[int]] = [[] for _ in range(num_gpus)]
    gpu_load = [0.0] * num_gpus
    for piece, expert in sorted(pieces, reverse=True):
        gpu = min((gpu for gpu in range(num_gpus) if len(held[gpu]) < capacity), key=gpu_load.__getitem__)
        held[gpu].append(expert)
        gpu_load[gpu] += piece
    return [expert for experts in held for expert in experts]


def greedy(case: Case, loads: Floats) -> Ints:
    return np.array([greedy_layer(load, case.num_slots, case.num_gpus) for load in loads.tolist()])


def milliseconds(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Minimum and median."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times), statistics.median(times)


def share_at_home(placed: Ints, num_nodes: int) -> float:
    groups = placed.reshape(len(placed), num_nodes, -1) // (NUM_EXPERTS // NUM_GROUPS)
    per_node = np.stack([(groups == group).sum(axis=2) for group in range(NUM_GROUPS)])
    return float(per_node.max(axis=2).sum() / placed.size)


def measure(case: Case) -> dict[str, float | int]:
    placed, placed_by_node = case.solve(case.loads), case.solve(case.loads, num_nodes=case.num_nodes)
    by_greedy = greedy(case, case.loads)
    noisy = case.loads * (1 + NOISE * np.random.default_rng(1).standard_normal(case.loads.shape)).clip(0)
    followed, fresh = case.solve(noisy, previous=placed), case.solve(noisy)
    ours, theirs = case.balancedness(placed), case.balancedness(by_greedy)
    solve_min, solve_median = milliseconds(lambda: case.solve(case.loads), REPEATS)
    return {
        "solve_ms": solve_min,
        "solve_median_ms": solve_median,
        "solve_nodes_ms": milliseconds(lambda: case.solve(case.loads, num_nodes=case.num_nodes), REPEATS)[0],
        "follow_ms": milliseconds(lambda: case.solve(noisy, previous=placed), REPEATS)[0],
        "greedy_ms": milliseconds(lambda: greedy(case, case.loads), 2)[0],
        "balancedness": float(ours.mean()),
        "balancedness_nodes": float(case.balancedness(placed_by_node).mean()),
        "balancedness_greedy": float(theirs.mean()),
        "balancedness_bound": float(replica_bound(case.loads, case.num_slots, case.num_gpus).balancedness.mean()),
        "worse_layers": int((ours < theirs - 1e-9).sum()),
        "worse_layers_nodes": int((case.balancedness(placed_by_node) < theirs - 1e-9).sum()),
        "near_home": share_at_home(placed, case.num_nodes),
        "near_home_nodes": share_at_home(placed_by_node, case.num_nodes),
        "moved_fraction": float((followed != placed).mean()),
        "moved_fraction_greedy": float((greedy(case, noisy) != by_greedy).mean()),
        "noise_balancedness_over_fresh": float((case.balancedness(followed, noisy) / case.balancedness(fresh, noisy)).mean()),
    }


def main() -> None:
    torch.set_num_threads(1)
    cases = make_cases()
    results = [measure(case) for case in cases]
    solve = Table(
        title=f"{NUM_LAYERS} layers x {NUM_EXPERTS} experts: solve (time: minimum / median of {REPEATS}) and balancedness"
    )
    for column in ("loads", "slots/GPUs", "ours ms", "greedy ms", "ours", "greedy", "bound", "worse layers"):
        solve.add_column(column, justify="left" if column == "loads" else "right")
    nodes = Table(title="ours with expert groups kept near a node")
    for column in ("loads", "slots/GPUs", "nodes", "ms", "balancedness", "near home", "unaware"):
        nodes.add_column(column, justify="left" if column == "loads" else "right")
    noise = Table(title="after 2% noise, from the placement before")
    for column in ("loads", "slots/GPUs", "ms", "slots moved", "greedy moves", "balancedness / fresh"):
        noise.add_column(column, justify="left" if column == "loads" else "right")
    for case, it in zip(cases, results, strict=True):
        label = (case.name, f"{case.num_slots}/{case.num_gpus}")
        time_both = f"{it['solve_ms']:.1f} / {it['solve_median_ms']:.1f}"
        balances = (f"{it[key]:.4f}" for key in ("balancedness", "balancedness_greedy", "balancedness_bound"))
        solve.add_row(*label, time_both, f"{it['greedy_ms']:.0f}", *balances, str(it["worse_layers"]))
        shares = (f"{it['balancedness_nodes']:.4f}", f"{it['near_home_nodes']:.0%}", f"{it['near_home']:.0%}")
        nodes.add_row(*label, str(case.num_nodes), f"{it['solve_nodes_ms']:.1f}", *shares)
        moves = (f"{it['moved_fraction']:.1%}", f"{it['moved_fraction_greedy']:.1%}", f"{it['noise_balancedness_over_fresh']:.4f}")
        noise.add_row(*label, f"{it['follow_ms']:.1f}", *moves)
    console = Console()
    for table in (solve, nodes, noise):
        console.print(table)
    rounded = [{key: round(value, 5) for key, value in it.items()} for it in results]
    details = {f"{case.name} {case.num_slots}/{case.num_gpus}": it for case, it in zip(cases, rounded, strict=True)}
    headline = {key: rounded[0][key] for key in ("solve_ms", "balancedness", "moved_fraction")}
    print(json.dumps({**headline, "cases": details}))


if __name__ == "__main__":
    main()
