"""The layout's arithmetic: every rank has one place, and every grouping covers all ranks once."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from rich.console import Console

from moesaic.launch.config import ServerConfig
from moesaic.launch.topology import RankPlace, Topology, render_topology

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "plain TP": {"tp_size": 4},
    "plain TP, EP 2": {"tp_size": 4, "ep_size": 2},
    "plain TP, all-to-all": {"tp_size": 4, "moe_a2a_backend": "torch"},
    "DP attention": {"tp_size": 4, "dp_size": 4, "enable_dp_attention": True, "moe_a2a_backend": "torch"},
    "DP 2 x TP 2": {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True},
    "two nodes": {"tp_size": 16, "dp_size": 8, "enable_dp_attention": True, "nnodes": 2, "moe_a2a_backend": "torch"},
    "three": {"tp_size": 12, "dp_size": 3, "enable_dp_attention": True, "ep_size": 6, "nnodes": 3},
}


@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_groups_cover_all_ranks_once_and_agree_with_the_places(flags: dict[str, Any]) -> None:
    topology = Topology.from_config(ServerConfig(model_path="m", **flags))
    places = topology.places()

    for groups, own_number, shared_number in (
        (topology.attn_tp_groups, "attn_tp_rank", "dp_rank"),
        (topology.dp_groups, "dp_rank", "attn_tp_rank"),
    ):
        assert sorted(chain.from_iterable(groups)) == list(range(topology.world_size))
        for group in groups:
            assert [getattr(places[rank], own_number) for rank in group] == list(range(len(group)))
            assert len({getattr(places[rank], shared_number) for rank in group}) == 1


@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS)
def test_nodes_hold_consecutive_ranks(flags: dict[str, Any]) -> None:
    topology = Topology.from_config(ServerConfig(model_path="m", **flags))

    held = [list(topology.ranks_of_node(node)) for node in range(topology.nnodes)]

    assert list(chain.from_iterable(held)) == list(range(topology.world_size))
    for node, ranks in enumerate(held):
        assert [topology.place(rank).node_rank for rank in ranks] == [node] * len(ranks)
        assert [topology.place(rank).local_rank for rank in ranks] == list(range(len(ranks)))


def test_one_rank_of_a_mixed_layout_by_hand() -> None:
    flags = {"tp_size": 8, "dp_size": 2, "enable_dp_attention": True, "ep_size": 4, "nnodes": 2}
    topology = Topology.from_config(ServerConfig(model_path="m", **flags))  # type: ignore[arg-type]

    assert topology.place(6) == RankPlace(rank=6, node_rank=1, local_rank=2, dp_rank=1, attn_tp_rank=2, ep_rank=3, moe_tp_rank=0)
    assert [place.rank for place in topology.places() if place.is_leader] == [0, 4]
    assert topology.attn_tp_groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert topology.dp_groups == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_experts_are_spread_evenly_over_all_ranks_with_an_all_to_all() -> None:
    topology = Topology.from_config(ServerConfig(model_path="m", tp_size=4, moe_a2a_backend="torch"))

    assert [topology.slots_of(rank, 256) for rank in range(4)] == [
        range(64),
        range(64, 128),
        range(128, 192),
        range(192, 256),
    ]


def test_dense_layers_follow_attention_unless_told_to_be_whole() -> None:
    flags: dict[str, Any] = {"model_path": "m", "tp_size": 8, "dp_size": 2, "enable_dp_attention": True}

    assert Topology.from_config(ServerConfig(**flags)).moe_dense_tp_size == 4
    assert Topology.from_config(ServerConfig(**flags, moe_dense_tp_size=1)).moe_dense_tp_size == 1


def test_the_table_shows_each_rank_with_its_expert_slots() -> None:
    topology = Topology.from_config(ServerConfig(model_path="m", tp_size=2, moe_a2a_backend="torch"))
    console = Console(width=120, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        console.print(render_topology(topology, 32))

    rows = [line.replace("│", " ").split() for line in capture.get().splitlines() if ".." in line]
    assert rows == [["0", "0", "0", "0", "0", "0..15"], ["1", "0", "0", "1", "1", "16..31"]]
