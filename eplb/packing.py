"""Experts packed on GPUs, and the two operations that better a packing by exchanging slots: level the loads, part replicas.

n problems are solved side by side (layers, or nodes of layers): G GPUs of k slots each. A piece is one replica's share of its
expert's load. Everything is changed in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic.eplb.location import Int64Array

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Place = tuple[Int64Array, Int64Array]  # GPU and slot, per problem

_ROUNDING = 1e-6
"""A swap counts only if it betters the pair of GPUs by more than this fraction of their difference."""
_PATIENCE = 4
"""Rounds without a lower maximum after which a problem is left as it is."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """experts int64 [n, G, k] and pieces float64 [n, G, k]: what each slot holds; loads float64 [n, G]: the sums of the pieces."""

    experts: Int64Array
    pieces: FloatArray
    loads: FloatArray

    @staticmethod
    def of(experts: Int64Array, piece_of_expert: FloatArray) -> Packing:
        """experts [n, G, k] in their slots, piece_of_expert [n, E]."""
        pieces = piece_of_expert[np.arange(len(experts))[:, None, None], experts]
        return Packing(experts=experts, pieces=pieces, loads=pieces.sum(axis=2))

    def split(self, parts: int) -> Packing:
        """The same arrays seen as `parts` times as many problems of G / parts GPUs each: one problem per node."""
        num_problems, num_gpus, num_slots = self.experts.shape
        shape = (num_problems * parts, num_gpus // parts, num_slots)
        return Packing(experts=self.experts.reshape(shape), pieces=self.pieces.reshape(shape), loads=self.loads.reshape(shape[:2]))

    def replace(self, problems: Int64Array, other: Packing, where: BoolArray) -> None:
        """Take over, for `problems` [m], those of `other`'s m problems that `where` [m] marks."""
        for ours, theirs in ((self.experts, other.experts), (self.pieces, other.pieces), (self.loads, other.loads)):
            ours[problems[where]] = theirs[where]


def level_loads(packing: Packing, limit: FloatArray, *, max_rounds: int, max_pairs: int, only_finishing: bool = False) -> None:
    """Swap slots of heavy GPUs with slots of light ones until no GPU is above its problem's `limit` [n], or the rounds are used up.

    A round pairs the `max_pairs` heaviest GPUs above the limit with the lightest ones, in all problems at once, and makes in each
    pair the one swap that brings their loads closest together. No swap brings two replicas of an expert onto one GPU, and none
    raises a maximum. `only_finishing`: only swaps after which both GPUs are within the limit, so that none is made in vain.
    """
    num_problems, num_gpus = packing.loads.shape
    num_pairs = min(num_gpus // 2, max_pairs)
    problems, idle_rounds = np.arange(num_problems), np.zeros(num_problems, dtype=np.int64)
    for number in range(max_rounds):
        loads = packing.loads[problems]
        largest = loads.max(axis=1)
        going = (largest > limit[problems]) & (idle_rounds < _PATIENCE)
        problems, idle_rounds, loads, largest = problems[going], idle_rounds[going], loads[going], largest[going]
        if not len(problems):
            return
        order = np.argsort(loads, axis=1)
        heavy = order[:, ::-1][:, :num_pairs]
        light = np.roll(order[:, :num_pairs], -number, axis=1)
        row, column = np.nonzero(np.take_along_axis(loads, heavy, axis=1) > limit[problems, None])
        first_gpu = problems[row] * num_gpus
        ceiling = limit[problems[row]] if only_finishing else np.full(len(row), np.inf)
        _swap_pairs(packing, heavy[row, column] + first_gpu, light[row, column] + first_gpu, ceiling)
        idle_rounds = np.where(packing.loads[problems].max(axis=1) < largest, 0, idle_rounds + 1)


def _swap_pairs(packing: Packing, heavy: Int64Array, light: Int64Array, ceiling: FloatArray) -> None:
    """One swap for every pair of GPUs that it betters and that brings it to its ceiling or below.

    heavy, light [pairs]: GPU numbers over all problems, all different.
    """
    num_slots = packing.experts.shape[2]
    experts, pieces = packing.experts.reshape(-1, num_slots), packing.pieces.reshape(-1, num_slots)
    loads = packing.loads.reshape(-1)
    half_gap = (loads[heavy] - loads[light]) / 2
    give, take = np.ascontiguousarray(pieces[heavy].T), np.ascontiguousarray(pieces[light].T)
    miss = (give - half_gap)[:, None, :] - take  # [slot of heavy, slot of light, pair]: pairs last, where numpy is fastest
    np.abs(miss, out=miss)
    i, j = np.divmod(miss.reshape(num_slots**2, -1).argmin(axis=0), num_slots)
    pairs = np.arange(len(heavy))
    given, taken = experts[heavy, i], experts[light, j]
    missed = miss[i, j, pairs]
    useful = (missed < half_gap * (1 - _ROUNDING)) & (loads[light] + half_gap + missed <= ceiling)
    useful &= ~(given == experts[light].T).any(axis=0) & ~(taken == experts[heavy].T).any(axis=0)
    heavy, light, i, j, pairs = heavy[useful], light[useful], i[useful], j[useful], pairs[useful]
    experts[heavy, i], experts[light, j] = taken[useful], given[useful]
    pieces[heavy, i], pieces[light, j] = take[j, pairs], give[i, pairs]
    loads[heavy] = pieces[heavy].sum(axis=1)
    loads[light] = pieces[light].sum(axis=1)


def lower_heaviest(packing: Packing, limit: FloatArray, *, max_rounds: int) -> None:
    """As `level_loads`, but thorough: a round swaps one slot of a problem's heaviest GPU with the best of all other slots.

    Best is the swap after which the heavier of its two GPUs is lightest, among those that bring no two replicas together.
    """
    problems = np.arange(len(packing.loads))
    for _ in range(max_rounds):
        problems = problems[packing.loads[problems].max(axis=1) > limit[problems]]
        if not len(problems):
            return
        problems = problems[_lower_heaviest_once(packing, problems)]


def _lower_heaviest_once(packing: Packing, problems: Int64Array) -> BoolArray:
    """One round for these problems; for which of them there was such a swap."""
    rows, num_slots = np.arange(len(problems)), packing.experts.shape[2]
    loads, experts, pieces = packing.loads[problems], packing.experts[problems], packing.pieces[problems]
    heavy = loads.argmax(axis=1)
    mine, give, largest = experts[rows, heavy], pieces[rows, heavy], loads[rows, heavy]
    best, best_i, best_other = largest * (1 - _ROUNDING), np.full(len(rows), -1), np.zeros(len(rows), dtype=np.int64)
    flat_pieces = pieces.reshape(len(rows), -1)
    rest = np.repeat(loads, num_slots, axis=1) - flat_pieces  # of the other GPU, without the slot that it gives
    rest[_holds(mine, experts.reshape(len(rows), -1))] = np.inf
    for i in range(num_slots):
        outcome = np.maximum(flat_pieces + (largest - give[:, i])[:, None], rest + give[:, i : i + 1])
        other = outcome.argmin(axis=1)
        useful = (outcome[rows, other] < best) & ~(experts[rows, other // num_slots] == mine[:, i : i + 1]).any(axis=1)
        best[useful], best_i[useful], best_other[useful] = outcome[rows, other][useful], i, other[useful]
    found = best_i >= 0
    gpu, slot = np.divmod(best_other[found], num_slots)
    _exchange(packing, problems[found], (heavy[found], best_i[found]), (gpu, slot))
    return found


def _holds(held: Int64Array, experts: Int64Array) -> BoolArray:
    """Which of the experts [n, m] are among those of the same problem in `held` [n, k]."""
    rows = np.arange(len(held))[:, None]
    is_held = np.zeros((len(held), int(experts.max(initial=0)) + 1), dtype=bool)
    is_held[rows, held] = True
    return is_held[rows, experts]


def _exchange(packing: Packing, problems: Int64Array, here: Place, there: Place) -> None:
    """Swap one slot (GPU, slot) with another in each of these problems."""
    for values in (packing.experts, packing.pieces):
        values[problems, *here], values[problems, *there] = values[problems, *there], values[problems, *here]
    for gpu in (here[0], there[0]):
        packing.loads[problems, gpu] = packing.pieces[problems, gpu].sum(axis=1)


def part_replicas(packing: Packing) -> None:
    """Swap until no GPU has two replicas of one expert. It must be possible: k <= E, and no expert has more than G replicas.

    A second replica goes where the most similar piece can come back from; one per problem at a time.
    """
    problems = np.arange(len(packing.experts))
    while True:
        ordered = np.sort(packing.experts[problems], axis=2)
        problems = problems[(ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=(1, 2))]
        if not len(problems):
            return
        experts, pieces = packing.experts[problems], packing.pieces[problems]
        gpu, slot = _doubled_slots(experts)
        rows = np.arange(len(problems))
        doubled, weight = experts[rows, gpu, slot], pieces[rows, gpu, slot]
        has_it = (experts == doubled[:, None, None]).any(axis=2)
        taken = _holds(experts[rows, gpu], experts.reshape(len(rows), -1))
        miss = np.abs(pieces - weight[:, None, None]).reshape(taken.shape)
        miss[taken | np.repeat(has_it, experts.shape[2], axis=1)] = np.inf
        other: Int64Array = miss.argmin(axis=1)
        other_gpu, other_slot = np.divmod(other, experts.shape[2])
        _exchange(packing, problems, (gpu, slot), (other_gpu, other_slot))
        for problem in problems[np.isinf(miss[rows, other])]:
            _deal_in_turn(packing.experts[problem], packing.pieces[problem])
            packing.loads[problem] = packing.pieces[problem].sum(axis=1)


def _doubled_slots(experts: Int64Array) -> tuple[Int64Array, Int64Array]:
    """GPU and slot, each [n], of a second replica of an expert on a GPU; every problem must have one."""
    order = np.argsort(experts, axis=2)
    ordered = np.take_along_axis(experts, order, axis=2)
    is_doubled = (ordered[:, :, 1:] == ordered[:, :, :-1]).reshape(len(experts), -1)
    gpu, rank = np.divmod(is_doubled.argmax(axis=1), experts.shape[2] - 1)
    return gpu, order[np.arange(len(experts)), gpu, rank]


def _deal_in_turn(experts: Int64Array, pieces: FloatArray) -> None:
    """The packing that never fails, for one problem: slots sorted by expert, dealt to the GPUs in turn."""
    num_gpus, num_slots = experts.shape
    order = np.argsort(experts.ravel(), kind="stable")
    for values in (experts, pieces):
        values[:] = values.ravel()[order].reshape(num_slots, num_gpus).T
