"""Tensors of a whole tree move together, and what they share they share afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.launch.engine.device_copies import ALIGNMENT, copied, to_device

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Leaf:
    values: Tensor
    name: str


@dataclass
class Changing:
    values: Tensor


def test_all_tensors_of_a_tree_arrive_with_their_values_and_shapes_in_one_piece_of_memory() -> None:
    ids = torch.arange(7)
    tree = (Leaf(ids, "ids"), (torch.tensor([0.5, 2.0]), torch.tensor([[True], [False]]), 3), Leaf(torch.empty(0, 4), "none"))

    moved = copied(tree, CPU)

    assert moved[0].name == "ids"
    assert moved[1][2] == 3
    pairs = [
        (moved[0].values, ids),
        (moved[1][0], torch.tensor([0.5, 2.0])),
        (moved[1][1], torch.tensor([[True], [False]])),
        (moved[2].values, torch.empty(0, 4)),
    ]
    for got, wanted in pairs:
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
        assert got.data_ptr() % ALIGNMENT == 0
    assert len({got.untyped_storage().data_ptr() for got, _ in pairs}) == 1
    assert moved[0].values.data_ptr() != ids.data_ptr()


def test_views_of_a_tensor_are_views_of_what_it_becomes() -> None:
    """The two micro-batches of a step see the ids that are filled into the whole."""
    ids = torch.arange(5)
    whole, first, second = copied((ids, ids[:2], ids[2:]), CPU)

    whole.fill_(9)

    assert (first.tolist(), second.tolist()) == ([9, 9], [9, 9, 9])


def test_what_may_change_and_what_is_to_stay_stays() -> None:
    stays, changing = Leaf(torch.ones(2), "stays"), Changing(torch.ones(2))

    moved, left, same = copied((Leaf(torch.ones(2), "moves"), stays, changing), CPU, stays)

    assert moved.values.data_ptr() != stays.values.data_ptr()
    assert left is stays
    assert same is changing


def test_between_cpu_and_cpu_nothing_is_copied() -> None:
    tree = (Leaf(torch.ones(2), "a"), None)
    assert to_device(tree, CPU) is tree
