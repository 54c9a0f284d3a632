"""How near each replica choice comes to the best split of a batch, and its cost: EP 32, 320 slots, 128 tokens a rank, top-8 of 256.

Every batch has a layer of its own, placed greedily for lognormal(0, 1) loads; the batch's real loads have drifted from those by
lognormal(0, 0.5). Balancedness is mean/max of the GPUs' tokens, averaged over batches. The floor is the linear program over
fractional splits of the same batch (scipy's HiGHS), which no choice can beat on that placement. "Slots in use" is the most that
any GPU must read weights for, which is what a decode step pays for; its floor is activated experts / GPUs. Times are medians of
one rank's select for one layer, the counts being given, on one thread.

    python benchmarks/bench_replica_choice.py [--num-batches 24] [--tokens-per-rank 128]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.eplb.batch_split import LayerReplicas, balanced_split, planned_weights
from moesaic.eplb.location import ExpertLocation, Int64Array
from moesaic.eplb.replica_choice import ALGORITHMS, ReplicaChoice, make_replica_choice

NUM_RANKS, NUM_EXPERTS, NUM_SLOTS, TOP_K = 32, 256, 320, 8


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One layer's placement, the load it was placed for, and the ids [num_ranks, T, K] that came instead."""

    location: ExpertLocation
    planned_load: NDArray[np.float64]
    ids: Tensor

    @property
    def counts(self) -> Tensor:
        """Tokens per rank and expert, int64 [num_ranks, E]."""
        return torch.stack([torch.bincount(ids.flatten(), minlength=NUM_EXPERTS) for ids in self.ids])


def place(load: NDArray[np.float64]) -> ExpertLocation:
    """Redundant slots to the heaviest expert per replica; then the heaviest replica to the least loaded GPU without its expert."""
    replicas = np.ones(NUM_EXPERTS, dtype=np.int64)
    for _ in range(NUM_SLOTS - NUM_EXPERTS):
        replicas[np.argmax(load / replicas)] += 1
    experts = np.repeat(np.arange(NUM_EXPERTS), replicas)
    piece = (load / replicas)[experts]
    gpu_load, held = np.zeros(NUM_RANKS), [list[int]() for _ in range(NUM_RANKS)]
    for index in np.argsort(-piece, kind="stable"):
        expert = int(experts[index])
        gpu = min(range(NUM_RANKS), key=lambda g: (len(held[g]) == NUM_SLOTS // NUM_RANKS, expert in held[g], gpu_load[g]))
        held[gpu].append(expert)
        gpu_load[gpu] += piece[index]
    slots = np.array(held, dtype=np.int64).reshape(1, -1)
    return ExpertLocation(physical_to_logical=slots, num_experts=NUM_EXPERTS, ep_size=NUM_RANKS, num_nodes=NUM_RANKS // 8)


def batches(num: int, tokens_per_rank: int, seed: int) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    for _ in range(num):
        load = rng.lognormal(0, 1, NUM_EXPERTS)
        drifted = load * rng.lognormal(0, 0.5, NUM_EXPERTS)
        score = np.log(drifted) + rng.gumbel(size=(NUM_RANKS, tokens_per_rank, NUM_EXPERTS))
        ids = np.argpartition(-score, TOP_K, axis=2)[:, :, :TOP_K]
        yield Batch(location=place(load), planned_load=load[None], ids=torch.from_numpy(ids))


def best_fractional_max(location: ExpertLocation, counts: Int64Array) -> float:
    """Tokens of the most loaded GPU under the best fractional split of counts [E]: the linear program."""
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array, hstack
    except ImportError as error:
        raise SystemExit("this benchmark needs scipy: pip install scipy") from error
    slots, ones = np.arange(NUM_SLOTS), np.ones(NUM_SLOTS)
    on_gpu = hstack([coo_array((ones, (location.gpu_of(slots), slots))), coo_array(-np.ones((NUM_RANKS, 1)))])
    of_expert = coo_array((ones, (location.physical_to_logical[0], slots)), shape=(NUM_EXPERTS, NUM_SLOTS + 1))
    cost = np.r_[np.zeros(NUM_SLOTS), 1]
    found = linprog(cost, A_ub=on_gpu.tocsr(), b_ub=np.zeros(NUM_RANKS), A_eq=of_expert.tocsr(), b_eq=counts, method="highs")
    return float(found.fun)


def make(algorithm: str, batch: Batch, rank: int, counts: Tensor) -> ReplicaChoice:
    weights = planned_weights(batch.location, batch.planned_load) if algorithm == "probability" else None
    return make_replica_choice(algorithm, batch.location, rank=rank, weights=weights, gather_counts=lambda _: counts)


def median_us(choice: ReplicaChoice, ids: Tensor, repeats: int = 15) -> float:
    times_us = np.empty(repeats)
    for index in range(repeats):
        start_s = time.perf_counter()
        choice.select(0, ids)
        times_us[index] = (time.perf_counter() - start_s) * 1e6
    return float(np.median(times_us))


def split_us(batch: Batch, repeats: int = 15) -> float:
    """Median microseconds of the balanced split alone."""
    layer = LayerReplicas.of(batch.location.physical_to_logical[0], num_experts=NUM_EXPERTS, num_gpus=NUM_RANKS)
    counts, times_us = batch.counts.sum(dim=0).numpy(), np.empty(repeats)
    for index in range(repeats):
        start_s = time.perf_counter()
        balanced_split(counts, layer)
        times_us[index] = (time.perf_counter() - start_s) * 1e6
    return float(np.median(times_us))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One batch under one choice: tokens of the most loaded GPU, most slots in use on a GPU, and microseconds of a select."""

    max_tokens: float
    max_slots: float
    select_us: float


def run(algorithm: str, batch: Batch) -> Outcome:
    counts = batch.counts
    if algorithm == "even":
        location = batch.location
        per_slot = (counts.sum(dim=0).numpy() / location.logical_count[0])[location.physical_to_logical[0]]
        return Outcome(max_tokens=per_slot.reshape(NUM_RANKS, -1).sum(axis=1).max(), max_slots=np.nan, select_us=np.nan)
    choices = [make(algorithm, batch, rank, counts) for rank in range(NUM_RANKS)]
    chosen = torch.stack([choice.select(0, ids) for choice, ids in zip(choices, batch.ids, strict=True)])
    per_gpu = torch.bincount(chosen.flatten(), minlength=NUM_SLOTS).view(NUM_RANKS, -1)
    return Outcome(
        max_tokens=float(per_gpu.sum(dim=1).max()),
        max_slots=float((per_gpu > 0).sum(dim=1).max()),
        select_us=median_us(choices[0], batch.ids[0]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-batches", type=int, default=24)
    parser.add_argument("--tokens-per-rank", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    all_batches = list(batches(args.num_batches, args.tokens_per_rank, args.seed))
    mean_tokens = args.tokens_per_rank * TOP_K
    floors = np.array([best_fractional_max(batch.location, batch.counts.sum(dim=0).numpy()) for batch in all_batches])
    activated = np.mean([int((batch.counts.sum(dim=0) > 0).sum()) for batch in all_batches]) / NUM_RANKS
    shares, times_us = {}, {}
    print(f"{'replica choice':<16}{'balancedness':>14}{'of the LP':>12}{'worst batch':>14}{'slots in use':>15}{'select (us)':>14}")
    for algorithm in ("even", *ALGORITHMS):
        outcomes = [run(algorithm, batch) for batch in all_batches]
        share = floors / np.array([outcome.max_tokens for outcome in outcomes])
        balance = np.mean([mean_tokens / outcome.max_tokens for outcome in outcomes])
        slots = np.mean([outcome.max_slots for outcome in outcomes])
        shares[algorithm], times_us[algorithm] = share, float(np.mean([outcome.select_us for outcome in outcomes]))
        numbers = f"{balance:>14.3f}{share.mean():>12.4f}{share.min():>14.4f}{slots:>15.2f}{times_us[algorithm]:>14.0f}"
        print(f"{algorithm:<16}{numbers.replace('nan', '  -')}")
    print(f"{'floor':<16}{np.mean(mean_tokens / floors):>14.3f}{1:>12.4f}{1:>14.4f}{activated:>15.2f}{'-':>14}")
    split_only_us = [split_us(batch) for batch in all_batches]
    print(f"balanced split alone: mean {np.mean(split_only_us):.0f} us, slowest batch {max(split_only_us):.0f} us (medians of 15)")
    result = {
        "balanced_share_of_lp": round(float(shares["balanced"].mean()), 4),
        "balanced_share_of_lp_worst": round(float(shares["balanced"].min()), 4),
        "select_us": round(times_us["balanced"], 1),
        "split_us": round(float(np.mean(split_only_us)), 1),
        "static_select_us": round(times_us["static"], 1),
        "num_batches": args.num_batches,
        "tokens_per_rank": args.tokens_per_rank,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
