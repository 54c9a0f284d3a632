"""The gate in Triton chooses what the reference chooses, and the replica fused behind it is the one that the table and hash say."""

from __future__ import annotations

import pytest
import torch
from device_kernels import on_each_device, random, same_bits, twice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.replica_choice import ReplicaTable, choose_replicas_reference
from moesaic.kernels.topk import grouped_topk_reference, grouped_topk_slots
from moesaic.kernels.triton import topk

SEEDS = st.integers(0, 2**31 - 1)


def _table(num_experts: int, most: int, seed: int, device: str, *, step: int | None) -> ReplicaTable:
    generator = torch.Generator().manual_seed(seed)
    return ReplicaTable(
        slots=torch.randperm(num_experts * most, generator=generator).view(num_experts, most).to(device),
        num_replicas=torch.randint(1, most + 1, (num_experts,), generator=generator).to(device),
        seed=seed,
        step=None if step is None else torch.tensor([step], device=device),
    )


@on_each_device
@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 5), groups=st.sampled_from([1, 2, 4, 8]), size=st.integers(1, 12), seed=SEEDS, data=st.data())
def test_choice_and_weights_equal_the_reference(
    *, device: str, tokens: int, groups: int, size: int, seed: int, data: st.DataObject
) -> None:
    topk_groups = data.draw(st.integers(1, groups)) if size > 1 else groups
    options = {
        "num_groups": groups,
        "topk_groups": topk_groups,
        "topk": data.draw(st.integers(1, topk_groups * size)),
        "normalize": data.draw(st.booleans()),
        "scaling_factor": 2.5,
    }
    logits = random(tokens, groups * size, seed=seed, device=device)
    bias = random(groups * size, seed=seed + 1, device=device) * 0.3
    ids, weights = twice(lambda: topk.grouped_topk(logits, bias, **options))
    expected_ids, exact_weights = grouped_topk_reference(logits.double(), bias.double(), **options)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=1e-5, atol=1e-7)

    table = _table(groups * size, data.draw(st.integers(1, 4)), seed, device, step=data.draw(st.sampled_from([None, 0, 2**40])))
    fused = twice(lambda: topk.grouped_topk_slots(logits, bias, table, **options))
    assert same_bits(fused[0], ids)
    assert same_bits(fused[1], weights)
    assert torch.equal(fused[2], choose_replicas_reference(ids, table))


@on_each_device
@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(0, 40), most=st.integers(1, 5), seed=SEEDS, step=st.sampled_from([None, 1, 2**33]))
def test_replicas_of_given_choices_equal_the_reference(*, device: str, tokens: int, most: int, seed: int, step: int | None) -> None:
    ids = torch.randint(-1, 9, (tokens, 8), generator=torch.Generator().manual_seed(seed)).to(device)
    table = _table(9, most, seed, device, step=step)
    slots = twice(lambda: topk.choose_replicas(ids, table))
    assert torch.equal(slots, choose_replicas_reference(ids, table))
    assert (slots[ids < 0] == -1).all()


def test_random_replicas_are_each_an_experts_own_all_used_alike_and_new_in_every_step() -> None:
    ids = torch.zeros(6000, 1, dtype=torch.int64)
    table = ReplicaTable(slots=torch.tensor([[4, 7, 9, -5]]), num_replicas=torch.tensor([3]), seed=1, step=torch.tensor([0]))
    slots = choose_replicas_reference(ids, table).flatten()
    assert slots.unique().tolist() == [4, 7, 9]
    assert (slots.bincount()[[4, 7, 9]] - 2000).abs().max() < 5 * (6000 * 2 / 9) ** 0.5
    later = ReplicaTable(slots=table.slots, num_replicas=table.num_replicas, seed=1, step=torch.tensor([1]))
    assert 0.25 < (choose_replicas_reference(ids, later).flatten() == slots).float().mean() < 0.42


@on_each_device
def test_ids_are_distinct_and_real_even_where_logits_are_not_numbers(device: str) -> None:
    logits = random(3, 60, seed=0, device=device)
    logits[0] = float("nan")
    logits[1, ::2] = float("nan")
    bias = torch.zeros(60, device=device)
    ids, _ = topk.grouped_topk(logits, bias, num_groups=5, topk_groups=2, topk=20, normalize=True, scaling_factor=1.0)
    for row in ids.tolist():
        assert len(set(row)) == 20
        assert all(0 <= expert < 60 for expert in row)


@on_each_device
def test_equal_scores_go_to_the_lowest_ids(device: str) -> None:
    logits, bias = torch.zeros(1, 32, device=device), torch.zeros(32, device=device)
    ids, _ = topk.grouped_topk(logits, bias, num_groups=4, topk_groups=2, topk=10, normalize=True, scaling_factor=1.0)
    assert ids.tolist() == [list(range(10))]


@on_each_device
def test_a_token_does_not_depend_on_its_batch(device: str) -> None:
    logits, bias = random(7, 48, seed=2, device=device), random(48, seed=3, device=device)
    options = {"num_groups": 4, "topk_groups": 2, "topk": 8, "normalize": True, "scaling_factor": 2.5}
    for whole, part in zip(
        topk.grouped_topk(logits, bias, **options), topk.grouped_topk(logits[2:5], bias, **options), strict=True
    ):
        assert same_bits(whole[2:5], part)


def test_the_front_function_takes_the_table_on_a_cpu_too() -> None:
    logits, table = random(4, 16, seed=0), _table(16, 2, 0, "cpu", step=3)
    ids, _, slots = grouped_topk_slots(
        logits, torch.zeros(16), table, num_groups=4, topk_groups=2, topk=3, normalize=True, scaling_factor=1.0
    )
    assert torch.equal(slots, choose_replicas_reference(ids, table))


def _gate(logits: Tensor, bias: Tensor, **changes: int) -> object:
    options = {"num_groups": 4, "topk_groups": 2, "topk": 3} | changes
    return topk.grouped_topk(logits, bias, normalize=True, scaling_factor=1.0, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: _gate(x.half(), x[0]), "logits is float16, wanted float32"),
        (lambda x: _gate(x, x[0, :3]), r"correction_bias has shape \[3\], wanted \[16\]"),
        (lambda x: _gate(x, x[0], num_groups=5), "num_groups is 5, wanted a divisor of the 16 experts"),
        (lambda x: _gate(x, x[0], topk_groups=5), "topk_groups is 5, wanted 1 to 4"),
        (lambda x: _gate(x, x[0], topk=9), "topk is 9, wanted 1 to 8"),
        (lambda x: topk.choose_replicas(x, _table(16, 2, 0, "cpu", step=0)), "topk_ids is float32, wanted int64"),
        (
            lambda x: grouped_topk_slots_of(x, _table(15, 2, 0, "cpu", step=0)),
            r"table.slots has shape \[15, 2\], wanted \[16, any\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(random(2, 16, seed=0))  # type: ignore[operator]


def grouped_topk_slots_of(logits: Tensor, table: ReplicaTable) -> object:
    return topk.grouped_topk_slots(
        logits, logits[0], table, num_groups=4, topk_groups=2, topk=3, normalize=True, scaling_factor=1.0
    )
