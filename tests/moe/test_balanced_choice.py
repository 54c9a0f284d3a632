"""The balanced replica choice that stays on the tokens' device chooses as eplb's, before and after a layer's experts have moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesaic.eplb.location import BadLocation, ExpertLocation
from moesaic.eplb.replica_choice import BatchChoice
from moesaic.moe.balanced_choice import DeviceBalancedChoice

RANKS, LAYERS, EXPERTS, SLOTS = 4, 2, 10, 16


def _slots(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.permutation(np.concatenate([np.arange(EXPERTS), generator.integers(0, EXPERTS, SLOTS - EXPERTS)]))


def test_it_chooses_as_eplb_does_also_after_experts_have_moved() -> None:
    generator = torch.Generator().manual_seed(3)
    location = ExpertLocation(
        physical_to_logical=np.stack([_slots(layer) for layer in range(LAYERS)]), num_experts=EXPERTS, ep_size=RANKS
    )
    batch = [torch.randint(-1, EXPERTS, (tokens, 3), generator=generator) for tokens in (9, 0, 30, 4)]
    batch = [torch.where(ids > 5, 3, ids) for ids in batch]  # expert 3 is much in demand
    counts = torch.stack([(ids.flatten() + 1).bincount(minlength=EXPERTS + 1)[1:] for ids in batch])
    for rank, ids in enumerate(batch):
        choice = DeviceBalancedChoice(location, rank=rank, gather_counts=lambda own: counts, device="cpu")
        known = BatchChoice(location, rank=rank, gather_counts=lambda own: counts)
        for _ in range(2):
            for layer in range(LAYERS):
                assert torch.equal(choice.select(layer, ids), known.select(layer, ids))
            for one in (choice, known):
                one.set_layer(1, _slots(17))


def test_a_map_that_cannot_be_is_refused_by_its_layer() -> None:
    location = ExpertLocation(physical_to_logical=_slots(0)[None], num_experts=EXPERTS, ep_size=RANKS)
    choice = DeviceBalancedChoice(location, rank=0, gather_counts=lambda own: own[None], device="cpu")
    with pytest.raises(BadLocation, match="sparse layer 0 has 16 slots, got a map of shape"):
        choice.set_layer(0, np.arange(10))
    with pytest.raises(BadLocation, match=r"sparse layer 0: .* wanted each of 0 to 9 at least once"):
        choice.set_layer(0, np.zeros(SLOTS, dtype=np.int64))
