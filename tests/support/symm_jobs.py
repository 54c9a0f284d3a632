"""The dispatcher over shared memory beside the one over collectives, on the same rows: jobs for a RankPool."""

from __future__ import annotations

import rank_pool
import torch
from shared_windows import shared_windows
from torch import Tensor

from moesaic.kernels.peer_exchange import PeerLayout
from moesaic.moe.all_to_all import AllToAllDispatcher
from moesaic.moe.communication import Communications
from moesaic.moe.config import ExpertPlacement
from moesaic.moe.counted_exchange import CountedExchange
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import Dispatcher, DispatchPlan
from moesaic.moe.experts import ExpertWeights, TorchExpertRunner
from moesaic.moe.gate import TopK
from moesaic.moe.symm import SymmDispatcher, triton_exchange
from moesaic.moe.symm_windows import WindowsInTurn

HIDDEN, INNER, TOPK, MOST_TOKENS = 128, 16, 2, 4


class Ranks:
    """One rank's two dispatchers and its experts, 2 of each rank."""

    def __init__(self, rank: int, world: int, **options: int) -> None:
        group = rank_pool.group_of(tuple(range(world)))
        self.rank, self.world = rank, world
        communications = self.communications = Communications()
        placement = ExpertPlacement(num_slots=2 * world, ep_size=world, ep_rank=rank)
        exchange = CountedExchange(
            size=world,
            counts_group=group,
            rows_group=rank_pool.group_of(tuple(range(world)), "rows"),
            communications=communications,
        )
        self.collective = AllToAllDispatcher(
            placement=placement, group=group, exchange=exchange, communications=communications, alignment=1
        )
        layout = PeerLayout(num_ranks=world, num_local=2, max_tokens=MOST_TOKENS, topk=TOPK, hidden=HIDDEN, dtype=torch.float32)
        windows = shared_windows(layout, rank, group, "cpu", **options)
        self.symm = SymmDispatcher(
            windows=WindowsInTurn(windows),
            exchange=triton_exchange(),
            normal=self.collective,
            communications=communications,
        )
        chance = torch.Generator().manual_seed(rank)
        gate_up = torch.randn(2, 2 * INNER, HIDDEN, generator=chance) * HIDDEN**-0.5
        weights = ExpertWeights(gate_up=gate_up, down=torch.randn(2, HIDDEN, INNER, generator=chance))
        self.runner = TorchExpertRunner(weights, fp8_activations=True)

    def inputs(self, num_tokens: int, seed: int) -> tuple[Tensor, TopK]:
        chance = torch.Generator().manual_seed(100 * seed + self.rank)
        hidden = torch.randn(num_tokens, HIDDEN, generator=chance) * torch.arange(1, num_tokens + 1).unsqueeze(1)
        ids = torch.rand(num_tokens, 2 * self.world, generator=chance).argsort(1)[:, :TOPK]
        return hidden, TopK(ids=ids, weights=torch.rand(num_tokens, TOPK, generator=chance))


def parity_job(rank: int, world: int, steps: list[tuple[DispatchMode, tuple[int, ...]]]) -> list[tuple[Tensor, Tensor]]:
    """Each step (its mode, each rank's number of tokens) by both dispatchers: what symm and the collectives give."""
    ranks, outputs = Ranks(rank, world), []
    for seed, (mode, counts) in enumerate(steps):
        hidden, topk = ranks.inputs(counts[rank], seed)
        plan = DispatchPlan(mode=mode, num_tokens_per_rank=counts)
        outputs.append((_straight(ranks, ranks.symm, hidden, topk, plan), _straight(ranks, ranks.collective, hidden, topk, plan)))
    return outputs


def two_batches_job(rank: int, world: int, counts: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Two micro-batches in turns, each beside the other's exchange, twice; and what collectives give for the same."""
    ranks, outputs = Ranks(rank, world), []
    plan = DispatchPlan(mode=DispatchMode.LOW_LATENCY, num_tokens_per_rank=counts)
    for step in range(2):
        batches = [ranks.inputs(counts[rank], 10 + 2 * step + index) for index in range(2)]
        sent = [ranks.symm.dispatch_a(hidden, topk, plan) for hidden, topk in batches]
        received = [ranks.symm.dispatch_b(handle) for handle in sent]
        back = [ranks.symm.combine_a(ranks.runner.run(each.rows), each.handle) for each in received]
        sums = [ranks.symm.combine_b(handle) for handle in back]
        outputs += [(own, _straight(ranks, ranks.collective, *batch, plan)) for own, batch in zip(sums, batches, strict=True)]
    return outputs


def _straight(ranks: Ranks, dispatcher: Dispatcher, hidden: Tensor, topk: TopK, plan: DispatchPlan) -> Tensor:
    received = dispatcher.dispatch_b(dispatcher.dispatch_a(hidden, topk, plan))
    return dispatcher.combine_b(dispatcher.combine_a(ranks.runner.run(received.rows), received.handle))


def absent_job(rank: int, world: int) -> str:
    """All ranks but the last dispatch: what they are told."""
    ranks = Ranks(rank, world, most_polls=10)
    if rank == world - 1:
        return ""
    hidden, topk = ranks.inputs(1, 0)
    plan = DispatchPlan(mode=DispatchMode.LOW_LATENCY, num_tokens_per_rank=(1,) * world)
    try:
        _straight(ranks, ranks.symm, hidden, topk, plan)
    except RuntimeError as error:
        return str(error)
    return "nothing was noticed"
