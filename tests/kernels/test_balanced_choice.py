"""The balanced replica choice is eplb's own, bit for bit, in the reference and in one Triton kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from device_kernels import on_each_device, twice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.replica_choice import BatchChoice
from moesaic.kernels import balanced_choice as front
from moesaic.kernels.triton import balanced_choice as device_choice

SEEDS = st.integers(0, 2**31 - 1)


def _slots(num_experts: int, num_gpus: int, redundant: int, seed: int) -> np.ndarray:
    """A random placement; replicas may meet on one GPU."""
    generator = np.random.default_rng(seed)
    extra = generator.integers(0, num_experts, redundant)
    return generator.permutation(np.concatenate([np.arange(num_experts), extra]))


def _batch(num_ranks: int, num_experts: int, tokens: int, topk: int, seed: int) -> list[Tensor]:
    """Choices of every rank, a few experts far more often than others."""
    generator = np.random.default_rng(seed)
    weights = generator.exponential(size=num_experts) ** 3 + 1e-3
    choices = [
        generator.choice(num_experts, (generator.integers(0, tokens + 1), topk), p=weights / weights.sum())
        for _ in range(num_ranks)
    ]
    return [torch.from_numpy(np.where(generator.random(ids.shape) < 0.1, -1, ids)) for ids in choices]


def _by_eplb(
    slots: np.ndarray, num_experts: int, num_gpus: int, batch: list[Tensor], rank: int, *, by_activated: bool = False
) -> Tensor:
    counts = torch.stack([front.count_choices_reference(ids, num_experts).total for ids in batch])
    location = ExpertLocation(physical_to_logical=slots[None], num_experts=num_experts, ep_size=num_gpus)
    choice = BatchChoice(location, rank=rank, gather_counts=lambda own: counts, by_activated=by_activated)
    return choice.select(0, batch[rank])


def _table(slots: np.ndarray, num_experts: int, num_gpus: int, device: str = "cpu") -> front.BalancedTable:
    return front.BalancedTable.of(torch.from_numpy(slots), num_experts=num_experts, num_gpus=num_gpus, device=device)


@on_each_device
@settings(max_examples=12, deadline=None)
@given(
    gpus=st.integers(1, 6),
    per_gpu=st.integers(1, 4),
    ranks=st.integers(1, 4),
    tokens=st.integers(0, 30),
    seed=SEEDS,
    by_activated=st.booleans(),
    data=st.data(),
)
def test_every_choice_goes_where_eplb_sends_it(
    *, device: str, gpus: int, per_gpu: int, ranks: int, tokens: int, seed: int, by_activated: bool, data: st.DataObject
) -> None:
    redundant = data.draw(st.integers(0, gpus * per_gpu - 1))
    num_experts = gpus * per_gpu - redundant
    slots = _slots(num_experts, gpus, redundant, seed)
    batch, rank = _batch(ranks, num_experts, tokens, 3, seed), seed % ranks
    expected = _by_eplb(slots, num_experts, gpus, batch, rank, by_activated=by_activated)
    counts = torch.stack([front.count_choices_reference(ids, num_experts).total for ids in batch])
    own = front.count_choices_reference(batch[rank], num_experts)
    how: dict[str, Any] = {"rank": rank, "by_activated": by_activated}
    assert torch.equal(front.choose_balanced(batch[rank], own, counts, _table(slots, num_experts, gpus), **how), expected)

    ids, table = batch[rank].to(device), _table(slots, num_experts, gpus, device)
    counted = device_choice.count_choices(ids, num_experts)
    assert torch.equal(counted.total.cpu(), own.total)
    got = twice(lambda: device_choice.choose_balanced(ids, counted, counts.to(device), table, **how))
    assert torch.equal(got.cpu(), expected)


@on_each_device
@pytest.mark.parametrize("num_gpus", [32, pytest.param(72, marks=pytest.mark.whole)])
def test_deepseeks_own_sizes(device: str, num_gpus: int) -> None:
    """256 experts and 32 redundant slots; of 128 tokens a rank, those of one rank are served."""
    slots, batch = _slots(256, num_gpus, 32, 5), _batch(num_gpus, 256, 128, 8, 6)
    counts = torch.stack([front.count_choices_reference(ids, 256).total for ids in batch]).to(device)
    ids = batch[7].to(device)
    own = device_choice.count_choices(ids, 256)
    got = device_choice.choose_balanced(ids, own, counts, _table(slots, 256, num_gpus, device), rank=7)
    assert torch.equal(got.cpu(), _by_eplb(slots, 256, num_gpus, batch, 7))


def _choose(**changes: Any) -> Tensor:
    slots = np.array([0, 1, 2, 0])
    ids = torch.zeros(2, 2, dtype=torch.int64)
    own = device_choice.count_choices(ids, 3)
    arguments = {"topk_ids": ids, "own": own, "counts": own.total[None], "table": _table(slots, 3, 2), "rank": 0} | changes
    return device_choice.choose_balanced(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _choose(topk_ids=torch.zeros(2, 2)), "topk_ids is float32, wanted int64"),
        (lambda: _choose(counts=torch.zeros(1, 4, dtype=torch.int64)), r"counts has shape \[1, 4\], wanted \[any, 3\]"),
        (lambda: _choose(rank=1), "rank is 1, wanted 0 to 0"),
        (lambda: _choose(own=front.ChoiceCounts(total=torch.zeros(3, dtype=torch.int64))), r"own.before has shape None, wanted"),
        (lambda: _table(np.array([0, 1, 1, 3]), 3, 2), "wanted each of 0 to 2 at least once"),
        (lambda: _table(np.array([0, 1, 2]), 3, 2), "slots has 3 elements, wanted a multiple of the 2 GPUs"),
        (
            lambda: front.BalancedTable.of(torch.tensor([0, 0, 0, 1]), num_experts=2, num_gpus=4, most_gpus=1),
            "most_gpus is 1, wanted 2 or more",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter checks it")
def test_what_does_not_fit_is_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
