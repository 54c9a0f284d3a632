"""From flags to where the experts lie: what is refused, and in which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import TinyModel

from moesaic.launch.config import ServerConfig
from moesaic.launch.errors import ConfigError
from moesaic.launch.expert_placement import ExpertPlan
from moesaic.launch.startup import make_plan

EP2 = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True, "moe_a2a_backend": "torch", "device": "cpu"}


@pytest.fixture
def plan(tiny: Callable[..., TinyModel]) -> Callable[..., ExpertPlan]:
    """The tiny model has 16 experts in two sparse layers."""

    def make(**flags: Any) -> ExpertPlan:
        return make_plan(ServerConfig(model_path=str(tiny("plain").folder), **{**EP2, **flags})).experts

    return make


def test_without_flags_every_expert_has_its_slot_and_nothing_is_chosen(plan: Callable[..., ExpertPlan]) -> None:
    made = plan()
    assert (made.slots.location, made.rebalance, made.digest) == (None, None, "trivial")


def test_redundant_experts_get_slots_and_a_policy(plan: Callable[..., ExpertPlan]) -> None:
    made = plan(ep_num_redundant_experts=4, ep_dispatch_algorithm="balanced")
    assert made.slots.location is not None
    assert made.slots.location.physical_to_logical[0].tolist() == [*range(16), 0, 1, 2, 3]
    assert (made.slots.replica_choice, made.slots.movable) == ("balanced", False)


def test_eplb_takes_its_flags(plan: Callable[..., ExpertPlan]) -> None:
    made = plan(
        enable_eplb=True,
        eplb_algorithm="deepseek",
        eplb_rebalance_num_iterations=7,
        eplb_rebalance_layers_per_chunk=2,
        eplb_min_rebalancing_utilization_threshold=0.9,
    )
    assert made.rebalance is not None
    assert made.slots.movable
    assert (made.rebalance.algorithm, made.rebalance.moves) == ("deepseek", True)
    config = made.rebalance.config
    assert (config.num_iterations, config.layers_per_chunk, config.min_utilization) == (7, 2, 0.9)


def test_a_load_decides_where_experts_lie(plan: Callable[..., ExpertPlan]) -> None:
    load = [[1] * 15 + [100], [100] + [1] * 15]
    made = plan(ep_num_redundant_experts=2, init_expert_location=json.dumps({"logical_count": load}))
    assert made.slots.location is not None
    assert made.slots.location.logical_count[0, 15] == 2  # one on each GPU
    assert made.slots.location.logical_count[1, 0] == 2


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"ep_num_redundant_experts": 3}, "--ep-num-redundant-experts 4"),
        ({"enable_eplb": True, "tp_size": 1, "dp_size": 1}, "--enable-eplb with 1 expert-parallel ranks"),
        ({"ep_dispatch_algorithm": "balanced"}, "add --ep-num-redundant-experts"),
        ({"init_expert_location": "/nowhere/map.json"}, "--init-expert-location: /nowhere/map.json"),
        ({"init_expert_location": json.dumps({"physical_to_logical": [[0] * 16, [*range(16)]]})}, "expert 1 of sparse layer 0"),
        ({"init_expert_location": json.dumps({"physical_to_logical": [[*range(16)]]})}, "layers"),
    ],
)
def test_what_cannot_be_placed_is_refused_with_its_reason(
    plan: Callable[..., ExpertPlan], flags: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**flags)
    assert wanted in str(caught.value)
