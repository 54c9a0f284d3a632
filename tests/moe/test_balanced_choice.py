"""The replica choices that stay on the tokens' device choose as eplb's, before and after a layer's experts have moved."""

from __future__ import annotations

from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from device_standin import installed

from moesaic.eplb.location import BadLocation, ExpertLocation
from moesaic.eplb.replica_choice import BatchChoice
from moesaic.launch.engine.cuda_graphs import CudaGraphs
from moesaic.moe.balanced_choice import DeviceBatchChoice

RANKS, LAYERS, EXPERTS, SLOTS = 4, 2, 10, 16


def _slots(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.permutation(np.concatenate([np.arange(EXPERTS), generator.integers(0, EXPERTS, SLOTS - EXPERTS)]))


@pytest.mark.parametrize("by_activated", [False, True], ids=["balanced", "activated"])
def test_it_chooses_as_eplb_does_also_after_experts_have_moved(*, by_activated: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    location = ExpertLocation(
        physical_to_logical=np.stack([_slots(layer) for layer in range(LAYERS)]), num_experts=EXPERTS, ep_size=RANKS
    )
    batch = [torch.randint(-1, EXPERTS, (tokens, 3), generator=generator) for tokens in (9, 0, 30, 4)]
    batch = [torch.where(ids > 5, 3, ids) for ids in batch]  # expert 3 is much in demand
    counts = torch.stack([(ids.flatten() + 1).bincount(minlength=EXPERTS + 1)[1:] for ids in batch])
    for rank, ids in enumerate(batch):
        options: dict[str, Any] = {"rank": rank, "gather_counts": lambda own: counts, "by_activated": by_activated}
        choice = DeviceBatchChoice(location, device="cpu", **options)
        known = BatchChoice(location, **options)
        for _ in range(2):
            for layer in range(LAYERS):
                assert torch.equal(choice.select(layer, ids), known.select(layer, ids))
            for one in (choice, known):
                one.set_layer(1, _slots(17))


@pytest.mark.skipif(not interpreter.AVAILABLE, reason="there is a GPU: no stand-in is needed")
@pytest.mark.parametrize("by_activated", [False, True], ids=["balanced", "activated"])
def test_what_a_graph_has_captured_sees_where_experts_have_moved(*, by_activated: bool) -> None:
    """A replay runs the same kernels on the same addresses, whatever happened in Python since."""
    location = ExpertLocation(physical_to_logical=_slots(0)[None], num_experts=EXPERTS, ep_size=RANKS)
    chosen = torch.randint(-1, EXPERTS, (20, 3), generator=torch.Generator().manual_seed(4))
    options: dict[str, Any] = {"rank": 0, "gather_counts": lambda own: own[None], "by_activated": by_activated}
    known = BatchChoice(location, **options)
    with installed():
        ids = chosen.to("cuda:0")
        choice = DeviceBatchChoice(location, device="cuda:0", **options)
        replay = CudaGraphs().capture(lambda: choice.select(0, ids))
        before = replay().cpu()
        choice.set_layer(0, _slots(17))
        after = replay().cpu()

    assert torch.equal(before, known.select(0, chosen))
    known.set_layer(0, _slots(17))
    assert torch.equal(after, known.select(0, chosen))
    assert not torch.equal(after, before)


def test_more_replicas_than_a_table_holds_are_used_in_part_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Twelve GPUs: at the start expert 0 is on two of them, then on twelve; the tables hold eight."""
    spread = np.arange(24) % 12
    location = ExpertLocation(physical_to_logical=spread[None], num_experts=12, ep_size=12)
    choice = DeviceBatchChoice(location, rank=0, gather_counts=lambda own: own[None], device="cpu")

    choice.set_layer(0, np.stack([np.zeros(12, dtype=np.int64), np.arange(12)]).T.flatten().copy())

    slots = choice.select(0, torch.zeros(40, 1, dtype=torch.int64))
    assert sorted(slots.flatten().bincount(minlength=24).tolist(), reverse=True) == [5] * 8 + [0] * 16
    assert "expert 0 of sparse layer 0 has 13 replicas; tokens are sent to those on 8 GPUs" in caplog.text


def test_a_map_that_cannot_be_is_refused_by_its_layer() -> None:
    location = ExpertLocation(physical_to_logical=_slots(0)[None], num_experts=EXPERTS, ep_size=RANKS)
    choice = DeviceBatchChoice(location, rank=0, gather_counts=lambda own: own[None], device="cpu")
    with pytest.raises(BadLocation, match="sparse layer 0 has 16 slots, got a map of shape"):
        choice.set_layer(0, np.arange(10))
    with pytest.raises(BadLocation, match=r"sparse layer 0: .* wanted each of 0 to 9 at least once"):
        choice.set_layer(0, np.zeros(SLOTS, dtype=np.int64))
