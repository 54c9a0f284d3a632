"""Every choice goes to a replica of its expert; static keeps near, random is fair, balanced and activated reach the optimum."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.eplb.batch_split import LayerReplicas, activated_split, balanced_split, planned_weights, split_of_source
from moesaic.eplb.location import BadLocation, ExpertLocation, Int64Array
from moesaic.eplb.replica_choice import ALGORITHMS, RandomChoice, ReplicaChoice, StaticChoice, make_replica_choice, static_slots


@st.composite
def placements(draw: st.DrawFn) -> ExpertLocation:
    """Any placement of up to 3 layers, 9 experts, 6 GPUs, also with two replicas of an expert on one GPU."""
    num_nodes, gpus_per_node, slots_per_gpu = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)))
    num_slots = num_nodes * gpus_per_node * slots_per_gpu
    num_experts = draw(st.integers(1, min(9, num_slots)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_layers = draw(st.integers(1, 3))
    extra = rng.integers(0, num_experts, size=(num_layers, num_slots - num_experts))
    slots = rng.permuted(np.hstack([np.tile(np.arange(num_experts), (num_layers, 1)), extra]), axis=1)
    return ExpertLocation(
        physical_to_logical=slots, num_experts=num_experts, ep_size=num_nodes * gpus_per_node, num_nodes=num_nodes
    )


def batches(location: ExpertLocation, seed: int, num_tokens: int = 20, top_k: int = 3) -> list[Tensor]:
    """Every rank's top-k ids, uneven over experts and ranks, with -1 among them."""
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(location.num_experts, 0.5))
    sizes = rng.integers(0, num_tokens + 1, size=location.ep_size)
    ids = [rng.choice(location.num_experts, size=(size, top_k), p=popularity) for size in sizes]
    return [torch.from_numpy(np.where(rng.random(batch.shape) < 0.1, -1, batch)) for batch in ids]


def count(ids: Tensor, num: int) -> Tensor:
    return torch.bincount(ids[ids >= 0], minlength=num)


def counts_of(location: ExpertLocation, ids: list[Tensor]) -> Int64Array:
    return torch.stack([count(batch, location.num_experts) for batch in ids]).numpy()


def choose(algorithm: str, location: ExpertLocation, layer_index: int, ids: list[Tensor]) -> list[Tensor]:
    """What every rank selects for its own batch."""
    counts = torch.from_numpy(counts_of(location, ids))
    weights = np.random.default_rng(0).integers(0, 3, size=location.physical_to_logical.shape)
    return [
        make_replica_choice(algorithm, location, rank=rank, weights=weights, gather_counts=lambda _: counts).select(
            layer_index, batch
        )
        for rank, batch in enumerate(ids)
    ]


def gpu_loads(location: ExpertLocation, per_slot: Int64Array) -> Int64Array:
    return per_slot.reshape(location.ep_size, -1).sum(axis=1)


def best_max_load(location: ExpertLocation, layer_index: int, counts: Int64Array) -> int:
    """The most that a GPU must bear, over all sets of GPUs, of the experts living in that set alone: the optimum (min-cut)."""
    gpus_of = [
        set(location.gpu_of(np.flatnonzero(location.physical_to_logical[layer_index] == expert)).tolist())
        for expert in range(location.num_experts)
    ]
    most = 0
    for size in range(1, location.ep_size + 1):
        for group in combinations(range(location.ep_size), size):
            confined = sum(int(counts[expert]) for expert, gpus in enumerate(gpus_of) if gpus <= set(group))
            most = max(most, -(-confined // size))
    return most


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=40, deadline=None)
@given(location=placements(), seed=st.integers(0, 2**32))
def test_every_choice_goes_to_a_replica_of_its_expert_and_none_stays_none(
    algorithm: str, location: ExpertLocation, seed: int
) -> None:
    ids = batches(location, seed)
    layer_index = seed % location.num_layers
    for wanted, slots in zip(ids, choose(algorithm, location, layer_index, ids), strict=True):
        assert slots.shape == wanted.shape
        assert slots.dtype == torch.int64
        assert ((slots == -1) == (wanted == -1)).all()
        chosen = slots[wanted >= 0].numpy()
        assert (location.physical_to_logical[layer_index][chosen] == wanted[wanted >= 0].numpy()).all()


@settings(max_examples=150, deadline=None)
@given(location=placements(), seed=st.integers(0, 2**32), scale=st.sampled_from([1, 5, 1000]))
def test_the_balanced_split_is_the_optimum_for_whole_tokens(location: ExpertLocation, seed: int, scale: int) -> None:
    counts = np.random.default_rng(seed).integers(0, scale + 1, size=location.num_experts)
    slots = location.physical_to_logical[0]
    split = balanced_split(counts, LayerReplicas.of(slots, num_experts=location.num_experts, num_gpus=location.ep_size))
    assert split.min() >= 0
    assert np.array_equal(np.bincount(slots, weights=split, minlength=location.num_experts), counts)
    assert gpu_loads(location, split).max() == best_max_load(location, 0, counts)


@settings(max_examples=100, deadline=None)
@given(location=placements(), seed=st.integers(0, 2**32))
def test_the_activated_split_uses_one_slot_per_activated_expert_and_as_few_as_can_be_on_any_gpu(
    location: ExpertLocation, seed: int
) -> None:
    counts = np.random.default_rng(seed).integers(0, 3, size=location.num_experts)
    slots = location.physical_to_logical[0]
    split = activated_split(counts, LayerReplicas.of(slots, num_experts=location.num_experts, num_gpus=location.ep_size))
    assert np.array_equal(np.bincount(slots, weights=split > 0, minlength=location.num_experts), counts > 0)
    assert np.array_equal(np.bincount(slots, weights=split, minlength=location.num_experts), counts)
    assert gpu_loads(location, split > 0).max() == best_max_load(location, 0, (counts > 0).astype(np.int64))


@pytest.mark.parametrize(("algorithm", "split"), [("balanced", balanced_split), ("activated", activated_split)])
@settings(max_examples=40, deadline=None)
@given(location=placements(), seed=st.integers(0, 2**32))
def test_the_ranks_choices_add_up_to_the_split(algorithm: str, split: object, location: ExpertLocation, seed: int) -> None:
    assert callable(split)
    ids = batches(location, seed)
    chosen = sum(count(slots, location.num_slots).numpy() for slots in choose(algorithm, location, 0, ids))
    layer = LayerReplicas.of(location.physical_to_logical[0], num_experts=location.num_experts, num_gpus=location.ep_size)
    assert np.array_equal(chosen, split(counts_of(location, ids).sum(axis=0), layer))


def test_each_source_sends_its_own_tokens_and_the_nearest_by_rank_order() -> None:
    layer = LayerReplicas.of(np.array([0, 1, 0, 2]), num_experts=3, num_gpus=2)
    counts = np.array([[6, 2, 1], [2, 0, 3]])
    split = balanced_split(counts.sum(axis=0), layer)
    assert split.tolist() == [5, 2, 3, 4]
    assert split_of_source(split, counts, 0, layer).tolist() == [5, 2, 1, 1]
    assert split_of_source(split, counts, 1, layer).tolist() == [0, 0, 2, 3]


def wide_placement(seed: int) -> tuple[ExpertLocation, Int64Array, Int64Array]:
    """256 experts in 320 slots on 32 GPUs, placed for loads from which this batch has drifted; ids of 32 ranks x 128 tokens x 8."""
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0, 1, 256)
    replicas = np.ones(256)
    for _ in range(64):
        replicas[np.argmax(load / replicas)] += 1
    experts = np.repeat(np.arange(256), replicas.astype(int))
    experts = experts[np.argsort(-(load / replicas)[experts], kind="stable")].reshape(10, 32)
    experts[1::2] = experts[1::2, ::-1]
    location = ExpertLocation(physical_to_logical=experts.T.reshape(1, 320), num_experts=256, ep_size=32)
    score = np.log(load * rng.lognormal(0, 0.5, 256)) + rng.gumbel(size=(32 * 128, 256))
    ids = np.argpartition(-score, 8, axis=1)[:, :8].reshape(32, 128, 8)
    return location, ids, np.bincount(ids.ravel(), minlength=256)


@pytest.mark.parametrize("seed", range(3))
def test_balanced_reaches_the_linear_programs_optimum_at_ep_32(seed: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    location, ids, counts = wide_placement(seed)
    slots = location.physical_to_logical[0]
    on_gpu = np.hstack([np.kron(np.eye(32), np.ones(10)), -np.ones((32, 1))])
    of_expert = np.hstack([slots == np.arange(256)[:, None], np.zeros((256, 1))])
    cost = np.r_[np.zeros(320), 1]
    optimum = optimize.linprog(cost, A_ub=on_gpu, b_ub=np.zeros(32), A_eq=of_expert, b_eq=counts, method="highs").fun
    chosen = choose("balanced", location, 0, list(torch.from_numpy(ids)))
    per_slot = torch.stack([count(batch, 320) for batch in chosen]).sum(dim=0).numpy()
    assert optimum - 1e-6 <= gpu_loads(location, per_slot).max() < optimum + 1


def test_static_prefers_the_own_gpu_then_the_own_node() -> None:
    # GPUs 0, 1 | 2, 3 with two slots each: expert 0 on GPUs 0 and 2, expert 1 on 0 and 3, expert 2 on 1, 3 on 1, 4 on 2, 5 on 3.
    location = ExpertLocation(physical_to_logical=np.array([[0, 1, 2, 3, 0, 4, 5, 1]]), num_experts=6, ep_size=4, num_nodes=2)
    chosen = [static_slots(location, rank)[0].tolist() for rank in range(4)]
    assert chosen == [[0, 1, 2, 3, 5, 6], [0, 1, 2, 3, 5, 6], [4, 7, 2, 3, 5, 6], [4, 7, 2, 3, 5, 6]]


@settings(max_examples=60, deadline=None)
@given(location=placements(), seed=st.integers(0, 2**16))
def test_static_goes_no_farther_than_it_must_and_deals_the_farther_ranks_evenly(location: ExpertLocation, seed: int) -> None:
    chosen = np.stack([static_slots(location, rank, seed) for rank in range(location.ep_size)])
    nodes = np.arange(location.ep_size) // location.gpus_per_node
    for layer_index, slots in enumerate(location.physical_to_logical):
        for expert in range(location.num_experts):
            replicas = np.flatnonzero(slots == expert)
            gpus = location.gpu_of(replicas)
            used = chosen[:, layer_index, expert]
            assert set(used) <= set(replicas)
            far_ranks = []
            for rank in range(location.ep_size):
                if rank in gpus:
                    assert location.gpu_of(used[rank]) == rank
                elif nodes[rank] in nodes[gpus]:
                    assert nodes[location.gpu_of(used[rank])] == nodes[rank]
                else:
                    far_ranks.append(rank)
            times = np.bincount(np.searchsorted(replicas, used[far_ranks]), minlength=len(replicas))
            assert times.max() - times.min() <= 1


def test_static_deals_the_ranks_of_a_node_evenly_and_the_seed_says_who_begins() -> None:
    location = ExpertLocation(physical_to_logical=np.array([[0, 0, 0, 1, 1, 1, 1, 1]]), num_experts=2, ep_size=8)
    used = {seed: [int(static_slots(location, rank, seed)[0, 0]) for rank in range(3, 8)] for seed in range(20)}
    assert all(sorted(np.bincount(slots, minlength=3)) == [1, 2, 2] for slots in used.values())
    assert len({tuple(slots) for slots in used.values()}) == 3


def one_expert(num_replicas: int) -> ExpertLocation:
    return ExpertLocation(physical_to_logical=np.array([[0] * num_replicas + [1]]), num_experts=2, ep_size=num_replicas + 1)


def test_dynamic_spreads_evenly_differs_between_steps_and_repeats_with_its_seed() -> None:
    ids = torch.zeros(4000, 3, dtype=torch.int64)
    choice, again, other = (make_replica_choice("dynamic", one_expert(3), rank=rank, seed=5) for rank in (0, 0, 1))
    first = choice.select(0, ids)
    assert (torch.bincount(first.flatten()) - 4000).abs().max() < 250  # five standard deviations
    assert torch.equal(first, again.select(0, ids))
    assert not torch.equal(first, choice.select(0, ids))
    assert not torch.equal(first, other.select(0, ids))


def test_probability_follows_the_weights_and_never_takes_a_slot_of_weight_zero() -> None:
    ids = torch.zeros(12000, 1, dtype=torch.int64)
    weights = np.array([[0.0, 3.0, 0.0, 1.0, 0.0, 7.0]])
    slots = make_replica_choice("probability", one_expert(5), rank=0, weights=weights).select(0, ids)
    times = torch.bincount(slots.flatten(), minlength=6)
    assert times[[0, 2, 4, 5]].tolist() == [0, 0, 0, 0]
    assert abs(int(times[1]) - 9000) < 250


def test_an_expert_without_any_weight_is_spread_evenly() -> None:
    slots = RandomChoice(one_expert(2), rank=0, weights=np.zeros((1, 3))).select(0, torch.zeros(1000, 1, dtype=torch.int64))
    assert torch.bincount(slots.flatten(), minlength=3).min() == 0
    assert (torch.bincount(slots.flatten())[:2] - 500).abs().max() < 100


def test_planned_weights_balance_the_planned_load() -> None:
    location, _, counts = wide_placement(0)
    weights = planned_weights(location, counts[None] / 7)
    layer = LayerReplicas.of(location.physical_to_logical[0], num_experts=256, num_gpus=32)
    best = gpu_loads(location, balanced_split(counts, layer)).max() / counts.sum()
    assert gpu_loads(location, weights[0]).max() / weights.sum() == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("algorithm", ["dynamic", "probability"])
def test_the_global_random_state_is_not_touched(algorithm: str) -> None:
    before = torch.get_rng_state()
    make_replica_choice(algorithm, one_expert(3), rank=0, weights=np.ones((1, 4))).select(0, torch.zeros(5, 2, dtype=torch.int64))
    assert torch.equal(before, torch.get_rng_state())


def tables_of(choice: ReplicaChoice) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in vars(choice).items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_layer_is_switched_in_place_to_what_a_fresh_choice_would_do_and_the_others_stay(algorithm: str) -> None:
    old = ExpertLocation.trivial(num_layers=3, num_experts=6, num_slots=8, ep_size=4, num_nodes=2)
    new = old.with_layer(1, np.array([5, 4, 3, 3, 3, 2, 1, 0]))
    ids = batches(old, 7)[0]
    counts = torch.from_numpy(counts_of(old, [ids] * 4))

    def make(location: ExpertLocation) -> ReplicaChoice:
        return make_replica_choice(algorithm, location, rank=0, weights=np.ones((3, 8)), gather_counts=lambda _: counts)

    switched, fresh = make(old), make(new)
    tables = tables_of(switched)
    switched.set_layer(1, new.physical_to_logical[1])
    assert tables_of(switched) == tables
    for layer_index in (0, 1, 2, 1):
        assert torch.equal(switched.select(layer_index, ids), fresh.select(layer_index, ids))


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 1, 2, 3, 4, 4, 4, 4], "expert 5 of sparse layer 1 would have no slot"),
        ([0, 1, 2, 3, 4, 5, 6, 0], "slot 6 of sparse layer 1 would hold expert 6, but there are 6 experts"),
        ([0, 1, 2, 3, 4, 5], r"sparse layer 1 has 8 slots, got a map of shape \[6\]"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_map_that_cannot_be_served_is_refused(algorithm: str, slots: list[int], message: str) -> None:
    location = ExpertLocation.trivial(num_layers=2, num_experts=6, num_slots=8, ep_size=4)
    choice = make_replica_choice(algorithm, location, rank=0, weights=np.ones((2, 8)), gather_counts=lambda counts: counts)
    with pytest.raises(BadLocation, match=message):
        choice.set_layer(1, np.array(slots))


@pytest.mark.parametrize(
    ("algorithm", "weights", "message"),
    [
        ("hash", None, "no replica choice 'hash'; choose one of static"),
        ("balanced", None, "'balanced' needs gather_counts"),
        ("activated", None, "'activated' needs gather_counts"),
        ("probability", None, "'probability' needs the weights"),
        ("probability", np.ones((1, 3)), r"shape \[1, 4\], got \[1, 3\]"),
        ("probability", np.array([[1, 1, -2, 1]]), "slot 2 of sparse layer 0 has weight -2.0"),
        ("probability", np.array([[1, np.nan, 1, 1]]), "slot 1 of sparse layer 0 has weight nan"),
    ],
)
def test_a_choice_that_cannot_work_is_refused(algorithm: str, weights: Int64Array | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_replica_choice(algorithm, one_expert(3), rank=0, weights=weights)


def test_an_idle_rank_takes_part_with_no_tokens() -> None:
    location = ExpertLocation.trivial(num_layers=1, num_experts=4, num_slots=8, ep_size=2)
    counts = torch.tensor([[3, 1, 0, 2], [0, 0, 0, 0]])
    for algorithm in ALGORITHMS:
        choice = make_replica_choice(
            algorithm, location, rank=1, weights=np.ones((1, 8)), gather_counts=lambda own: counts * (own.sum() == 0)
        )
        assert choice.select(0, torch.empty(0, 8, dtype=torch.int64)).shape == (0, 8)


def test_a_static_choice_is_the_table_of_its_rank() -> None:
    location = ExpertLocation.trivial(num_layers=2, num_experts=6, num_slots=8, ep_size=4, num_nodes=2)
    ids = torch.tensor([[0, 5, -1], [3, 3, 1]])
    expected = static_slots(location, 3, seed=9)[1]
    slots = StaticChoice(location, rank=3, seed=9).select(1, ids)
    assert slots.tolist() == [[expected[0], expected[5], -1], [expected[3], expected[3], expected[1]]]
