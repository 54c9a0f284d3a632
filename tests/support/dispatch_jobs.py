"""Dispatchers on real collectives: seeded inputs of every rank, the job that runs one rank, and the answer in float64."""

from __future__ import annotations

from dataclasses import dataclass

import rank_pool
import torch
from torch import Tensor

from moesaic.moe.all_gather import AllGatherDispatcher
from moesaic.moe.all_to_all import AllToAllDispatcher
from moesaic.moe.communication import Communications
from moesaic.moe.config import ExpertPlacement
from moesaic.moe.counted_exchange import CountedExchange
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan, MaskedRows
from moesaic.moe.experts import ExpertWeights, TorchExpertRunner
from moesaic.moe.gate import TopK

HIDDEN, INNER = 12, 8


@dataclass(frozen=True, kw_only=True)
class DispatchCase:
    """`counts`: tokens of each source (a rank for "torch", a DP rank for "none").

    `only_expert_rank`: all choices fall on this EP rank. "none" runs dp = len(counts) groups, and splits each expert over
    world / ep ranks. `halves`: outputs go back in two halves. `overlaps`: see `DispatchPlan`.
    """

    backend: str
    mode: DispatchMode
    world: int
    counts: tuple[int, ...]
    ep: int
    num_experts: int = 8
    topk: int = 3
    alignment: int = 1
    only_expert_rank: int | None = None
    halves: bool = False
    overlaps: bool = False
    seed: int = 0

    def describe(self) -> str:
        return f"{self}".removeprefix("DispatchCase")


def case_inputs(case: DispatchCase, source: int) -> tuple[Tensor, TopK]:
    """hidden [T, H] and distinct experts of a source's tokens."""
    generator = torch.Generator().manual_seed(1000 * case.seed + source)
    num_tokens = case.counts[source]
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    first, width = 0, case.num_experts
    if case.only_expert_rank is not None:
        width = case.num_experts // case.ep
        first = case.only_expert_rank * width
    ids = torch.rand(num_tokens, width, generator=generator).argsort(1)[:, : case.topk] + first
    return hidden, TopK(ids=ids, weights=torch.rand(num_tokens, case.topk, generator=generator))


def case_weights(case: DispatchCase) -> ExpertWeights:
    """All experts, whole."""
    generator = torch.Generator().manual_seed(case.seed)
    gate_up = torch.randn(case.num_experts, 2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5
    down = torch.randn(case.num_experts, HIDDEN, INNER, generator=generator) * INNER**-0.5
    return ExpertWeights(gate_up=gate_up, down=down)


def direct_sum(case: DispatchCase, source: int) -> Tensor:
    """Each token's weighted sum over its experts, one at a time in float64, [T, H]."""
    hidden, topk = case_inputs(case, source)
    weights = case_weights(case)
    total = torch.zeros(len(hidden), HIDDEN, dtype=torch.float64)
    for token, (row, ids, shares) in enumerate(zip(hidden.double(), topk.ids, topk.weights.double(), strict=True)):
        for expert, share in zip(ids, shares, strict=True):
            gate, up = (weights.gate_up[expert].double() @ row).split(INNER)
            total[token] += share * (weights.down[expert].double() @ (gate * gate.sigmoid() * up))
    return total


@dataclass(frozen=True, kw_only=True)
class DispatchResult:
    """A rank's combined output, and the shape and counts of the rows that its experts got."""

    output: Tensor
    rows_shape: tuple[int, ...]
    masked: bool
    counts: list[int]


def dispatch_job(rank: int, cases: list[DispatchCase]) -> list[DispatchResult]:
    """Job for a RankPool: runs all cases (of one world size) on this rank."""
    return [_run(rank, case) for case in cases]


def _run(rank: int, case: DispatchCase) -> DispatchResult:
    moe_tp = case.world // case.ep
    placement = ExpertPlacement(num_slots=case.num_experts, ep_size=case.ep, ep_rank=rank // moe_tp)
    source = rank * len(case.counts) // case.world
    hidden, topk = case_inputs(case, source)
    dispatcher = _dispatcher(rank, case, placement, source)
    handle = dispatcher.dispatch_a(
        hidden, topk, DispatchPlan(mode=case.mode, num_tokens_per_rank=case.counts, overlaps=case.overlaps)
    )
    received = dispatcher.dispatch_b(handle)  # type: ignore[arg-type]
    runner = TorchExpertRunner(_own_experts(case, placement, rank % moe_tp, moe_tp))
    if case.halves:
        inner, halves = runner.gate_up(received.rows), dispatcher.halve(received)  # type: ignore[arg-type]
        handles = [dispatcher.combine_a(runner.down(half.pick(inner)), half.handle) for half in halves]  # type: ignore[arg-type]
        output = torch.cat([dispatcher.combine_b(handle) for handle in handles])  # type: ignore[arg-type]
    else:
        handle = dispatcher.combine_a(runner.run(received.rows), received.handle)  # type: ignore[arg-type]
        output = dispatcher.combine_b(handle)  # type: ignore[arg-type]
    masked = isinstance(received.rows, MaskedRows)
    return DispatchResult(
        output=output,
        rows_shape=tuple(received.rows.hidden.shape),
        masked=masked,
        counts=torch.as_tensor(received.rows.counts).tolist(),
    )


def _dispatcher(rank: int, case: DispatchCase, placement: ExpertPlacement, source: int) -> AllGatherDispatcher | AllToAllDispatcher:
    everyone = rank_pool.group_of(tuple(range(case.world))) if case.world > 1 else None
    communications = Communications()
    if case.backend == "torch":
        exchange = CountedExchange(
            size=case.world,
            counts_group=everyone,
            rows_group=rank_pool.group_of(tuple(range(case.world)), "rows") if case.world > 1 else None,
            communications=communications,
        )
        return AllToAllDispatcher(
            placement=placement,
            group=everyone,
            exchange=exchange,
            communications=communications,
            alignment=case.alignment,
            halves=case.halves,
        )
    dp_size = len(case.counts)
    attn_tp = case.world // dp_size
    peers = tuple(range(rank % attn_tp, case.world, attn_tp))
    return AllGatherDispatcher(
        placement=placement,
        dp_rank=source,
        dp_size=dp_size,
        dp_group=rank_pool.group_of(peers) if dp_size > 1 else None,
        reduce_group=everyone,
        communications=communications,
        alignment=case.alignment,
    )


def _own_experts(case: DispatchCase, placement: ExpertPlacement, part: int, parts: int) -> ExpertWeights:
    """This rank's experts, or its slice of each."""
    weights = case_weights(case)
    experts = slice(placement.first, placement.first + placement.num_local)
    gate, up = weights.gate_up[experts].chunk(2, dim=1)
    gate_up = torch.cat([half.chunk(parts, dim=1)[part] for half in (gate, up)], dim=1)
    down = weights.down[experts].chunk(parts, dim=2)[part]
    # As the model's builder lays them out: then a row's output does not depend on the rows beside it.
    gate_up, down = (weight.transpose(1, 2).contiguous().transpose(1, 2) for weight in (gate_up, down))
    return ExpertWeights(gate_up=gate_up, down=down)
