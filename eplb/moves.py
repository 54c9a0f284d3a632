"""Which weights must travel where when one layer's placement changes, and in which rounds. Pure; knows no process group.

A *move* brings one expert to one GPU, for one or more of its slots. A *round* is a set of moves in which every GPU talks to at
most one other, in one or both directions. Terms: location.py.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from moesaic.eplb.location import Int64Array


class MoveKind(IntEnum):
    """What a destination slot needs: nothing; an expert that its GPU holds already; one that another slot of its GPU receives; a
    message from its node; a message from another node."""

    UNCHANGED = 0
    LOCAL_COPY = 1
    SHARED_RECEIVE = 2
    SAME_NODE = 3
    CROSS_NODE = 4


@dataclass(frozen=True, kw_only=True)
class Move:
    """`expert` goes from `source_slot` on GPU `source` to `slots`, all on GPU `destination`. Slots count over all GPUs."""

    expert: int
    source: int
    source_slot: int
    destination: int
    slots: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LayerMoves:
    """All moves of one layer: kinds int8 [R], a MoveKind per slot; local copies; messages in rounds."""

    kinds: NDArray[np.int8]
    local_copies: tuple[Move, ...]
    rounds: tuple[tuple[Move, ...], ...]

    @property
    def messages(self) -> list[Move]:
        return [move for moves in self.rounds for move in moves]


def plan_moves(old: Int64Array, new: Int64Array, *, ep_size: int, num_nodes: int = 1) -> LayerMoves:
    """One layer's experts per slot before and after, int64 [R] each -> its moves.

    A source is on the destination's node where one is, and of these the one with the least to send. Raises ValueError when an
    expert of `new` is nowhere in `old`, or the sizes don't divide.
    """
    if old.shape != new.shape or old.ndim != 1 or len(old) % ep_size or ep_size % num_nodes:
        shapes = f"{list(old.shape)} -> {list(new.shape)}"
        raise ValueError(f"slots {shapes} can't be dealt evenly to {ep_size} GPUs on {num_nodes} nodes")
    slots_per_gpu = len(old) // ep_size
    gpus_per_node = ep_size // num_nodes
    kinds = np.zeros(len(old), dtype=np.int8)
    wanted: dict[tuple[int, int], list[int]] = defaultdict(list)
    for slot in np.flatnonzero(old != new).tolist():
        wanted[slot // slots_per_gpu, int(new[slot])].append(slot)
    holders = _holders(old, {expert for _, expert in wanted}, slots_per_gpu)
    local_copies, messages = [], []
    to_send = [0] * ep_size
    # The fewer sources an expert has, the sooner it chooses.
    for (gpu, expert), slots in sorted(wanted.items(), key=lambda item: (len(holders[item[0][1]]), item[0])):
        source = _choose_source(holders[expert], gpu, gpus_per_node, to_send)
        move = Move(expert=expert, source=source, source_slot=holders[expert][source], destination=gpu, slots=tuple(slots))
        if source == gpu:
            local_copies.append(move)
            kinds[slots] = MoveKind.LOCAL_COPY
            continue
        messages.append(move)
        to_send[source] += 1
        kinds[slots[1:]] = MoveKind.SHARED_RECEIVE
        same_node = source // gpus_per_node == gpu // gpus_per_node
        kinds[slots[0]] = MoveKind.SAME_NODE if same_node else MoveKind.CROSS_NODE
    return LayerMoves(kinds=kinds, local_copies=tuple(local_copies), rounds=colour_rounds(messages))


def _holders(old: Int64Array, experts: set[int], slots_per_gpu: int) -> dict[int, dict[int, int]]:
    """Expert -> {GPU: its first slot there}. Raises ValueError for an expert that nobody holds."""
    holders: dict[int, dict[int, int]] = {expert: {} for expert in experts}
    for slot, expert in enumerate(old.tolist()):
        if expert in holders:
            holders[expert].setdefault(slot // slots_per_gpu, slot)
    for expert, found in holders.items():
        if not found:
            raise ValueError(f"expert {expert} is in no slot of the old placement, so nobody can send it")
    return holders


def _choose_source(holders: dict[int, int], gpu: int, gpus_per_node: int, to_send: list[int]) -> int:
    node = gpu // gpus_per_node
    return min(holders, key=lambda source: (source != gpu, source // gpus_per_node != node, to_send[source], source))


def colour_rounds(messages: list[Move]) -> tuple[tuple[Move, ...], ...]:
    """Deal messages into rounds: greedy matchings, the pair with the busiest GPU first.

    With D the most exchanges any GPU has (a pair exchanges both directions at once), at least D rounds are needed, and a maximal
    matching per round takes at most 2 * D - 1; busiest first mostly gives D.

    A pair exchanges one expert per direction and round. All of its experts at once would save next to nothing, since a placement is
    solved from the one before: 256 experts in 288 slots of 32 GPUs, random loads, take 10.2 rounds a layer from the trivial
    placement (9.5 that way), and 3.3 (3.3) when the loads change by 30%. Only a solver that starts from nothing (`deepseek`) on few
    GPUs moves so much that pairs meet again and again: 40 rounds (7) on 8 GPUs, 18 (17) on 32.
    """
    queues: dict[tuple[int, int], tuple[deque[Move], deque[Move]]] = defaultdict(lambda: (deque(), deque()))
    for move in messages:
        pair = (min(move.source, move.destination), max(move.source, move.destination))
        queues[pair][move.source > move.destination].append(move)
    remaining = {pair: max(len(up), len(down)) for pair, (up, down) in queues.items()}
    degree: dict[int, int] = defaultdict(int)
    for (low, high), count in remaining.items():
        degree[low] += count
        degree[high] += count
    rounds = []
    while remaining:
        busy: set[int] = set()
        moves: list[Move] = []
        for pair in sorted(remaining, key=lambda pair: _urgency(pair, degree)):
            if busy.isdisjoint(pair):
                busy.update(pair)
                moves += [queue.popleft() for queue in queues[pair] if queue]
                remaining[pair] -= 1
        for gpu in busy:
            degree[gpu] -= 1
        remaining = {pair: count for pair, count in remaining.items() if count}
        rounds.append(tuple(moves))
    return tuple(rounds)


def _urgency(pair: tuple[int, int], degree: dict[int, int]) -> tuple[int, int, tuple[int, int]]:
    low, high = degree[pair[0]], degree[pair[1]]
    return -max(low, high), -min(low, high), pair
