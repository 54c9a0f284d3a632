"""Moves bring every expert where it is wanted, rounds never pair a GPU twice, and messages over gloo arrive whole."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from eplb_jobs import GlooCase, gloo_locations, gloo_moves, move_job, poll_job
from eplb_network import MemoryNetwork, Seam
from eplb_weights import make_weights, random_location
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import RankPool

from moesaic.eplb.location import Int64Array
from moesaic.eplb.mover import ChecksumError, WeightMover
from moesaic.eplb.moves import LayerMoves, Move, MoveKind, plan_moves
from moesaic.eplb.transfer import Quarantine, TreeSum, fresh_tag


@st.composite
def changes(draw: st.DrawFn, max_gpus: int = 64) -> tuple[Int64Array, Int64Array, int, int]:
    """Old and new slots, GPUs, nodes: from a few slots changed to all of them."""
    ep_size = draw(st.integers(1, max_gpus))
    num_nodes = draw(st.sampled_from([nodes for nodes in (1, 2, 4, 8) if ep_size % nodes == 0]))
    num_slots = ep_size * draw(st.integers(1, 9))
    num_experts = draw(st.integers(max(1, num_slots // 3), num_slots))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    sizes = {"num_layers": 2, "num_experts": num_experts, "num_slots": num_slots, "ep_size": ep_size}
    old, new = random_location(rng, **sizes).physical_to_logical
    if draw(st.booleans()):
        new = old.copy()
        some = rng.permutation(num_slots)[: max(2, num_slots // 10)]
        new[some] = new[rng.permutation(some)]
    return old, new, ep_size, num_nodes


def exchanges_of_busiest(messages: list[Move]) -> int:
    """The least number of rounds: a GPU talks to one other per round, and a pair exchanges both directions."""
    counts = Counter((move.source, move.destination) for move in messages)
    degree: Counter[int] = Counter()
    for low, high in {(min(pair), max(pair)) for pair in counts}:
        exchanges = max(counts[low, high], counts[high, low])
        degree[low] += exchanges
        degree[high] += exchanges
    return max(degree.values(), default=0)


@settings(max_examples=80, deadline=None)
@given(changes())
def test_following_the_moves_gives_the_new_placement(change: tuple[Int64Array, Int64Array, int, int]) -> None:
    old, new, ep_size, num_nodes = change
    per_gpu = len(old) // ep_size
    moves = plan_moves(old, new, ep_size=ep_size, num_nodes=num_nodes)
    result = old.copy()
    for move in (*moves.local_copies, *moves.messages):
        assert old[move.source_slot] == move.expert
        assert move.source_slot // per_gpu == move.source
        assert {slot // per_gpu for slot in move.slots} == {move.destination}
        result[list(move.slots)] = move.expert
    assert np.array_equal(result, new)


@settings(max_examples=80, deadline=None)
@given(changes())
def test_every_slot_has_its_kind_and_no_weight_travels_needlessly(change: tuple[Int64Array, Int64Array, int, int]) -> None:
    old, new, ep_size, num_nodes = change
    moves = plan_moves(old, new, ep_size=ep_size, num_nodes=num_nodes)
    gpus = np.arange(len(old)) // (len(old) // ep_size)
    nodes = gpus // (ep_size // num_nodes)
    received: dict[tuple[int, int], int] = defaultdict(int)
    for slot, kind in enumerate(moves.kinds.tolist()):
        holders = np.flatnonzero(old == new[slot])
        here, near = gpus[slot] in gpus[holders], nodes[slot] in nodes[holders]
        if old[slot] == new[slot]:
            assert kind == MoveKind.UNCHANGED
        elif here:
            assert kind == MoveKind.LOCAL_COPY
        else:
            received[int(gpus[slot]), int(new[slot])] += kind != MoveKind.SHARED_RECEIVE
            assert kind in (MoveKind.SHARED_RECEIVE, MoveKind.SAME_NODE if near else MoveKind.CROSS_NODE)
    assert set(received.values()) <= {1}
    assert len(moves.messages) == len(received)


@settings(max_examples=80, deadline=None)
@given(changes())
def test_rounds_pair_every_gpu_at_most_once_and_are_few(change: tuple[Int64Array, Int64Array, int, int]) -> None:
    old, new, ep_size, num_nodes = change
    moves = plan_moves(old, new, ep_size=ep_size, num_nodes=num_nodes)
    for moves_of_round in moves.rounds:
        pairs = {frozenset((move.source, move.destination)) for move in moves_of_round}
        assert sum(len(pair) for pair in pairs) == len(frozenset().union(*pairs))
        assert len({(move.source, move.destination) for move in moves_of_round}) == len(moves_of_round)
    least = exchanges_of_busiest(moves.messages)
    assert least <= len(moves.rounds) <= 1.5 * least + 1  # 3/2 is Shannon's bound for edge colours of a multigraph


@settings(max_examples=60, deadline=None)
@given(changes(), st.integers(0, 1 << 30))
def test_no_deadlock_at_any_size_whoever_runs_ahead(change: tuple[Int64Array, Int64Array, int, int], seed: int) -> None:
    """Ranks post their rounds in order and go on when both sides have posted; the order in which ranks run is random."""
    old, new, ep_size, num_nodes = change
    moves = plan_moves(old, new, ep_size=ep_size, num_nodes=num_nodes)
    todo: dict[int, list[tuple[int, int]]] = defaultdict(list)  # (round, peer)
    for index, moves_of_round in enumerate(moves.rounds):
        for low, high in {(min(m.source, m.destination), max(m.source, m.destination)) for m in moves_of_round}:
            todo[low].append((index, high))
            todo[high].append((index, low))
    rng = np.random.default_rng(seed)
    at = dict.fromkeys(todo, 0)
    while any(at[gpu] < len(todo[gpu]) for gpu in todo):
        ready = []
        for gpu, rounds in todo.items():
            if at[gpu] < len(rounds):
                index, peer = rounds[at[gpu]]
                if at[peer] < len(todo[peer]) and todo[peer][at[peer]] == (index, gpu):
                    ready.append((gpu, peer))
        assert ready, f"all wait: {at}"
        for gpu in ready[int(rng.integers(len(ready)))]:
            at[gpu] += 1


def test_sources_share_the_sending() -> None:
    """Expert 0 lies on four GPUs and four others want it: each holder sends it once."""
    old = np.array([0, 0, 0, 0, 1, 2, 3, 4])
    new = np.array([0, 1, 2, 3, 4, 0, 0, 0])
    moves = plan_moves(old, new, ep_size=8)
    senders = Counter(move.source for move in moves.messages if move.expert == 0)
    assert senders == {0: 1, 1: 1, 2: 1}


def test_the_same_node_sends_when_it_can() -> None:
    old = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    new = np.array([1, 0, 2, 3, 0, 1, 3, 2])
    moves = plan_moves(old, new, ep_size=8, num_nodes=2)
    assert set(moves.kinds.tolist()) == {MoveKind.UNCHANGED, MoveKind.SAME_NODE}
    assert len(moves.rounds) == 1


def test_the_same_placement_moves_nothing() -> None:
    slots = np.array([0, 1, 2, 0])
    moves = plan_moves(slots, slots, ep_size=2)
    assert not moves.kinds.any()
    assert not moves.local_copies
    assert not moves.rounds


def test_an_expert_that_nobody_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="expert 2 is in no slot"):
        plan_moves(np.array([0, 1]), np.array([0, 2]), ep_size=2)
    with pytest.raises(ValueError, match="can't be dealt evenly to 2 GPUs"):
        plan_moves(np.array([0, 1, 2]), np.array([0, 1, 2]), ep_size=2)


def test_tags_are_fresh_for_every_cycle_layer_and_round() -> None:
    tags = {fresh_tag(cycle, layer, index) for cycle in range(20) for layer in range(0, 255, 17) for index in range(0, 4096, 371)}
    assert len(tags) == 20 * 15 * 12
    assert max(fresh_tag(2047, 255, 4095), *tags) < 1 << 31
    with pytest.raises(ValueError, match="layer 256, round 0"):
        fresh_tag(0, 256, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
def test_a_sum_over_the_tree_is_exact_in_any_order_of_polling(world_size: int) -> None:
    rng = np.random.default_rng(world_size)
    arrays = rng.integers(0, 1 << 60, size=(world_size, 3, 5)) // world_size
    network = MemoryNetwork(world_size, Seam())
    sums = [TreeSum(network.wire(rank), Quarantine(), arrays[rank], 1) for rank in range(world_size)]
    complete: set[int] = set()
    while len(complete) < world_size:
        rank = int(rng.integers(world_size))
        complete.update({rank} if sums[rank].done() else set())
    assert all(np.array_equal(pending.result(), arrays.sum(axis=0)) for pending in sums)


def test_a_changed_bit_is_found_by_the_receiver_and_names_expert_layer_and_sender() -> None:
    network = MemoryNetwork(2, Seam(kind="post", at=1, action="corrupt"))
    rng = np.random.default_rng(0)
    location = random_location(rng, num_layers=1, num_experts=2, num_slots=2, ep_size=2)
    swap = location.physical_to_logical[0][::-1].copy()
    moves = plan_moves(location.physical_to_logical[0], swap, ep_size=2)
    movers = [
        WeightMover(layers=make_weights(location, rank), wire=network.wire(rank), quarantine=Quarantine(), clock=lambda: 0.0)
        for rank in range(2)
    ]
    for mover in movers:
        mover.begin(1, 0, moves)
        mover.work(1.0)
    assert movers[1].work(1.0)
    with pytest.raises(ChecksumError, match=rf"expert {swap[0]} of sparse layer 0 did not arrive from GPU 1"):
        movers[0].work(1.0)


def test_work_stops_at_the_end_of_its_budget() -> None:
    """With a clock that moves a millisecond per look, a budget of one is one portion, and all portions together are the move."""
    location = random_location(np.random.default_rng(0), num_layers=1, num_experts=6, num_slots=6, ep_size=1)
    now = iter(range(10_000))
    mover = WeightMover(
        layers=make_weights(location, 0), wire=MemoryNetwork(1, Seam()).wire(0), quarantine=Quarantine(), clock=lambda: next(now)
    )
    slots = location.physical_to_logical[0]
    mover.begin(1, 0, plan_moves(slots, slots[::-1].copy(), ep_size=1))
    portions = 1
    while not mover.work(next(now) + 1):
        portions += 1
    assert portions > 6 * 4


def kinds(moves: list[list[LayerMoves]]) -> set[int]:
    return {kind for layers in moves for layer in layers for kind in layer.kinds.tolist()}


@pytest.mark.parametrize(
    "case",
    [
        GlooCase(world=2, num_experts=6, num_slots=10, num_nodes=1, num_placements=6, seed=1),
        GlooCase(world=2, num_experts=9, num_slots=10, num_nodes=2, num_placements=6, seed=2),
        GlooCase(world=4, num_experts=8, num_slots=24, num_nodes=2, num_placements=6, seed=3),
        GlooCase(world=4, num_experts=32, num_slots=32, num_nodes=1, num_placements=6, seed=4),
    ],
)
def test_weights_and_scales_follow_the_map_over_gloo(rank_pool: RankPool, case: GlooCase) -> None:
    needed = {MoveKind.UNCHANGED, MoveKind.LOCAL_COPY, MoveKind.SHARED_RECEIVE} if case.num_slots > case.num_experts + 3 else set()
    assert needed <= kinds(gloo_moves(case))
    assert (MoveKind.CROSS_NODE in kinds(gloo_moves(case))) == (case.num_nodes > 1)
    assert gloo_locations(case)[0].num_layers == 2
    for lies, staging_bytes, weight_bytes in rank_pool.run(case.world, move_job, case):
        assert lies == []
        assert staging_bytes <= weight_bytes


def test_a_message_over_gloo_is_polled_without_blocking(rank_pool: RankPool) -> None:
    assert rank_pool.run(2, poll_job) == [(False, True, True), (False, True, True)]


def test_packed_and_plain_layouts_are_both_tested() -> None:
    location = random_location(np.random.default_rng(0), num_layers=1, num_experts=2, num_slots=2, ep_size=1)
    matrix, spread, _, scale = make_weights(location, 0)[0]
    assert not matrix[0].is_contiguous()
    assert matrix[0].t().is_contiguous()
    assert not spread[0].is_contiguous()
    assert not spread[0].t().is_contiguous()
    assert scale[0].shape == torch.Size([])
