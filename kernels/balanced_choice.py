"""Replica choice `balanced`: all ranks' counts of this very batch split so that the most loaded GPU has as few tokens as any split
can give it, and each choice of one rank sent to a replica by that split. `activated`: the same split of activated experts, each of
which counts once and so goes whole to one replica.

The split is a transport problem (experts to GPUs). Every rank solves it alone, in integers and in one fixed order, so that equal
counts give equal splits everywhere: shared experts go whole to their emptiest GPU, then GPUs above the limit shed load along
shortest paths of shares; where no path is left, the reached GPUs' mean is a proven bound and becomes the limit (Newton's method on
the parametric flow: Dinkelbach 1967; Gallo, Grigoriadis, Tarjan 1989). Ranks in turn fill an expert's replicas in slot order.

An expert is *fixed* when all its replicas lie on one GPU (its first slot there is used), else *shared*. E experts, R slots, S
shared experts, M GPUs of one expert at most. Knows one layer and one rank; gathering the ranks' counts is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels.checks import check_number, check_tensor
from moesaic.kernels.gpu import uses_triton


@dataclass(frozen=True, kw_only=True)
class BalancedTable:
    """One layer's slots as the split needs them, int32; build with `of`. -1 is padding; shapes follow from R and M.

    fixed_experts [num_gpus, F]: those of each GPU. shared_experts [S]; shared_gpus, shared_slots [S, M]: where each has its
    replicas. shared_index [E]: which of the S it is, -1 = fixed. first_slots [E]: the slot of a fixed expert.
    """

    fixed_experts: Tensor
    shared_experts: Tensor
    shared_gpus: Tensor
    shared_slots: Tensor
    shared_index: Tensor
    first_slots: Tensor

    @staticmethod
    def of(
        slots: Tensor, *, num_experts: int, num_gpus: int, most_gpus: int | None = None, device: torch.device | str = "cpu"
    ) -> BalancedTable:
        """slots int64 [R] on the CPU: the expert of each slot; slot s lies on GPU s // (R / num_gpus).

        M is `most_gpus`, by default a power of two, 4 or more, that these slots need. An expert on more GPUs than M uses those of
        its first slots. Raises ValueError.
        """
        check_tensor("BalancedTable.of", "slots", slots, shape=(None,), dtypes=(torch.int64,), like=torch.empty(0))
        experts = slots.numpy()
        _check_slots(experts, num_experts, num_gpus)
        most = max(4, most_replicas(experts)) if most_gpus is None else most_gpus
        check_number("BalancedTable.of", "most_gpus", most, at_least=2)
        per_gpu, num_shared = len(experts) // num_gpus, max(len(experts) - num_experts, 1)
        fixed = np.full((num_gpus, per_gpu), -1, dtype=np.int32)
        shared_experts, index = np.full(num_shared, -1, dtype=np.int32), np.full(num_experts, -1, dtype=np.int32)
        gpus, places = (np.full((num_shared, most), -1, dtype=np.int32) for _ in range(2))
        first = np.zeros(num_experts, dtype=np.int32)
        found = 0
        for expert in range(num_experts):
            own = np.flatnonzero(experts == expert)
            own_gpus, first_there = np.unique(own // per_gpu, return_index=True)
            first[expert] = own[0]
            if len(own_gpus) == 1:
                row = fixed[own_gpus[0]]
                row[np.argmax(row < 0)] = expert
                continue
            shared_experts[found], index[expert], used = expert, found, min(len(own_gpus), most)
            gpus[found, :used], places[found, :used] = own_gpus[:used], own[first_there[:used]]
            found += 1
        return BalancedTable(
            fixed_experts=_put(fixed, device),
            shared_experts=_put(shared_experts, device),
            shared_gpus=_put(gpus, device),
            shared_slots=_put(places, device),
            shared_index=_put(index, device),
            first_slots=_put(first, device),
        )

    def assign(self, other: BalancedTable) -> None:
        """Take the other table's contents, at the same addresses; shapes are equal."""
        for name, tensor in vars(self).items():
            tensor.copy_(getattr(other, name))

    def check(self, function: str, like: Tensor) -> None:
        """Raises ValueError where the tensors don't fit each other or the device."""
        num_shared, most = self.shared_gpus.shape
        shapes = {
            "fixed_experts": (None, None),
            "shared_experts": (num_shared,),
            "shared_gpus": (num_shared, most),
            "shared_slots": (num_shared, most),
            "shared_index": (None,),
            "first_slots": self.shared_index.shape,
        }
        for name, shape in shapes.items():
            check_tensor(
                function, f"table.{name}", getattr(self, name), shape=shape, dtypes=(torch.int32,), like=like, contiguous=True
            )


def most_replicas(experts: np.ndarray) -> int:
    """experts int64 [R] of slots -> a power of two that holds the replicas of any of them."""
    return 1 << (int(np.bincount(experts).max(initial=1)) - 1).bit_length()


@dataclass(frozen=True, kw_only=True)
class ChoiceCounts:
    """A rank's choices, counted. total int64 [E]; on a device also before int32 [chunks, E]: those in the chunks before."""

    total: Tensor
    before: Tensor | None = None


def count_choices(topk_ids: Tensor, num_experts: int) -> ChoiceCounts:
    """topk_ids int64 [T, K], logical, -1 = none -> their number per expert. Nothing waits for a device. Raises ValueError."""
    if uses_triton(topk_ids):
        from moesaic.kernels.triton import balanced_choice as device

        return device.count_choices(topk_ids.contiguous(), num_experts)
    return count_choices_reference(topk_ids, num_experts)


def count_choices_reference(topk_ids: Tensor, num_experts: int) -> ChoiceCounts:
    """The same in torch, any device."""
    check_tensor("count_choices", "topk_ids", topk_ids, shape=(None, None), dtypes=(torch.int64,))
    flat = topk_ids.flatten() + 1
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    return ChoiceCounts(total=counts.scatter_add_(0, flat, torch.ones_like(flat))[1:])


def choose_balanced(
    topk_ids: Tensor, own: ChoiceCounts, counts: Tensor, table: BalancedTable, *, rank: int, by_activated: bool = False
) -> Tensor:
    """topk_ids int64 [T, K], -1 = none -> slots int64 [T, K]; -1 stays -1.

    `own`: what `count_choices` gave for these ids. counts int64 [num_ranks, E]: that of all ranks, this one's in row `rank`; their
    sum is below 2**31. by_activated: an expert counts once, however many tokens it has. One kernel on a device, which waits for
    nothing. Raises ValueError.
    """
    if uses_triton(topk_ids):
        from moesaic.kernels.triton import balanced_choice as device

        return device.choose_balanced(topk_ids.contiguous(), own, counts, table, rank=rank, by_activated=by_activated)
    return choose_balanced_reference(topk_ids, own, counts, table, rank=rank, by_activated=by_activated)


def choose_balanced_reference(
    topk_ids: Tensor, own: ChoiceCounts, counts: Tensor, table: BalancedTable, *, rank: int, by_activated: bool = False
) -> Tensor:
    """The same in Python; brings everything to the CPU."""
    check_choice(topk_ids, own, counts, table, rank)
    all_counts = counts.cpu()
    totals = all_counts.sum(0)
    shares = np.array(balanced_shares(totals.gt(0).long() if by_activated else totals, table))
    if by_activated:
        shares *= totals.numpy()[table.shared_experts.cpu().numpy(), None]
    ends, slots = np.cumsum(shares, axis=1), table.shared_slots.cpu().numpy()
    index, first = table.shared_index.tolist(), table.first_slots.tolist()
    seen = all_counts[:rank].sum(0).tolist()
    chosen = []
    for expert in topk_ids.flatten().tolist():
        if expert < 0:
            chosen.append(-1)
            continue
        shared = index[expert]
        if shared < 0:
            chosen.append(first[expert])
        else:
            chosen.append(int(slots[shared, np.searchsorted(ends[shared], seen[expert], side="right")]))
        seen[expert] += 1
    return torch.tensor(chosen, dtype=torch.int64, device=topk_ids.device).view_as(topk_ids)


def balanced_shares(totals: Tensor, table: BalancedTable) -> list[list[int]]:
    """Tokens per expert int64 [E], on the CPU -> those that each GPU gets of each shared expert, [S][M]."""
    tokens: list[int] = totals.tolist()
    gpus = [[gpu for gpu in row if gpu >= 0] for row in table.shared_gpus.tolist()]
    loads = [sum(tokens[expert] for expert in row if expert >= 0) for row in table.fixed_experts.tolist()]
    limit = max(-(-sum(tokens) // len(loads)), *loads)
    shares = [[0] * table.shared_gpus.shape[1] for _ in gpus]
    for shared, expert in enumerate(table.shared_experts.tolist()):
        if expert >= 0:
            emptiest = min(range(len(gpus[shared])), key=lambda place: loads[gpus[shared][place]])
            loads[gpus[shared][emptiest]] += tokens[expert]
            shares[shared][emptiest] = tokens[expert]
    for source in sorted(range(len(loads)), key=loads.__getitem__, reverse=True):
        while loads[source] > limit:
            reached = _relieve(source, limit, gpus, loads, shares)
            if loads[source] > limit and all(loads[gpu] >= limit for gpu in reached):
                limit = -(-sum(loads[gpu] for gpu in reached) // len(reached))
    return shares


def _relieve(source: int, limit: int, gpus: list[list[int]], loads: list[int], shares: list[list[int]]) -> list[int]:
    """One breadth-first search from an overloaded GPU along positive shares, shedding load where there is room; those reached."""
    via: dict[int, tuple[int, int]] = {}
    reached = [source]
    for near in reached:
        for shared, places in enumerate(gpus):
            for far in places:
                if near not in places or far in reached or not shares[shared][places.index(near)]:
                    continue
                via[far] = (near, shared)
                reached.append(far)
                if loads[far] < limit:
                    path = _path(source, far, via, gpus)
                    most = min(loads[source] - limit, limit - loads[far])
                    amount = min(most, *(shares[row][before] for row, before, _ in path))
                    for row, before, place in path:
                        shares[row][before] -= amount
                        shares[row][place] += amount
                    loads[source] -= amount
                    loads[far] += amount
                    if loads[source] <= limit:
                        return reached
    return reached


def _path(source: int, target: int, via: dict[int, tuple[int, int]], gpus: list[list[int]]) -> list[tuple[int, int, int]]:
    """The hops that lead to `target`, last first: the shared expert and its places before and after."""
    path, gpu = [], target
    while gpu != source:
        before, shared = via[gpu]
        path.append((shared, gpus[shared].index(before), gpus[shared].index(gpu)))
        gpu = before
    return path


def check_choice(topk_ids: Tensor, own: ChoiceCounts, counts: Tensor, table: BalancedTable, rank: int) -> None:
    """What `choose_balanced` refuses. Raises ValueError."""
    function = "choose_balanced"
    check_tensor(function, "topk_ids", topk_ids, shape=(None, None), dtypes=(torch.int64,))
    table.check(function, topk_ids)
    shape = (None, table.shared_index.shape[0])
    check_tensor(function, "counts", counts, shape=shape, dtypes=(torch.int64,), like=topk_ids, contiguous=True)
    check_tensor(function, "own.total", own.total, shape=shape[1:], dtypes=(torch.int64,), like=topk_ids)
    check_number(function, "rank", rank, at_least=0, at_most=counts.shape[0] - 1)


def _check_slots(experts: np.ndarray, num_experts: int, num_gpus: int) -> None:
    check_number("BalancedTable.of", "num_gpus", num_gpus, at_least=1)
    if len(experts) % num_gpus:
        raise ValueError(f"BalancedTable.of: slots has {len(experts)} elements, wanted a multiple of the {num_gpus} GPUs")
    missing = np.setdiff1d(np.arange(num_experts), experts)
    if len(missing) or experts.min(initial=0) < 0 or experts.max(initial=0) >= num_experts:
        raise ValueError(
            f"BalancedTable.of: slots hold experts {experts.min(initial=0)} to {experts.max(initial=0)} and lack "
            f"{missing[:3].tolist()}, wanted each of 0 to {num_experts - 1} at least once"
        )


def _put(array: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(array).to(device)
