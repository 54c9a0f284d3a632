"""Illegal layouts: refused in one message that names the flags, their values and what would be legal."""

from __future__ import annotations

from typing import Any

import pytest

from moesaic.launch.config import ServerConfig
from moesaic.launch.conflicts import refuse
from moesaic.launch.errors import ConfigError
from moesaic.launch.layout_rules import layout_conflicts
from moesaic.launch.model_rules import model_conflicts
from moesaic.launch.topology import ModelShape

SHAPE = ModelShape(
    num_heads=12,
    num_experts=24,
    moe_intermediate_size=48,
    intermediate_size=96,
    vocab_size=480,
    context_length=1024,
    num_shared_experts=1,
    fp8_checkpoint=True,
)
DP = {"enable_dp_attention": True}
ILLEGAL_ALONE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"tp_size": 8, "dp_size": 3, **DP}, ("--tp-size 8", "--dp-size 3", "--dp-size 2 or --dp-size 4")),
    ({"tp_size": 4, "dp_size": 8, **DP}, ("--dp-size 8", "nearest legal: --dp-size 4")),
    ({"tp_size": 4, "dp_size": 4}, ("--dp-size 4 without --enable-dp-attention", "add --enable-dp-attention")),
    ({"tp_size": 8, "nnodes": 3, "dist_init_addr": "h:1"}, ("--tp-size 8 --nnodes 3", "--nnodes 2 or --nnodes 4")),
    ({"tp_size": 6, "ep_size": 4}, ("--tp-size 6 --ep-size 4", "--ep-size 3 or --ep-size 6")),
    (
        {"tp_size": 8, "ep_size": 4, "moe_a2a_backend": "torch"},
        ("--ep-size 4 --moe-a2a-backend torch", "--ep-size 8", "--moe-a2a-backend none"),
    ),
    (
        {"tp_size": 8, "dp_size": 2, "moe_dense_tp_size": 2, **DP},
        ("--moe-dense-tp-size 2", "--moe-dense-tp-size 1 or 4"),
    ),
    ({"tp_size": 2, "enable_dp_lm_head": True}, ("--enable-dp-lm-head", "add --enable-dp-attention")),
    ({"tp_size": 2, "nnodes": 2}, ("--nnodes 2 without --dist-init-addr", "HOST:PORT")),
    ({"tp_size": 2, "nnodes": 2, "node_rank": 2, "dist_init_addr": "h:1"}, ("--node-rank 2", "--node-rank 0..1")),
]
ILLEGAL_FOR_THE_MODEL: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"tp_size": 8}, ("--tp-size 8 --dp-size 1", "12 attention heads", "--dp-size 2")),
    (
        {"tp_size": 16, "dp_size": 16, "moe_a2a_backend": "torch", **DP},
        ("--tp-size 16 --moe-a2a-backend torch", "24 experts", "--moe-a2a-backend none", "--ep-num-redundant-experts 8"),
    ),
    ({"tp_size": 16, "dp_size": 8, "ep_size": 16, **DP}, ("--ep-size 16", "24 experts", "--ep-size 8")),
    ({"tp_size": 32, "dp_size": 8, **DP}, ("--tp-size 32 --ep-size 1", "moe_intermediate_size 48", "--ep-size 2")),
    ({"tp_size": 9, "dp_size": 3, **DP}, ("vocab_size", "480", "--enable-dp-lm-head")),
    ({"tp_size": 64, "dp_size": 1}, ("intermediate_size 96", "--moe-dense-tp-size 1")),
    ({"tp_size": 2, "quantization": "fp8"}, ("--quantization fp8", "FP8 block of 128")),
]


@pytest.mark.parametrize(("flags", "wanted"), ILLEGAL_ALONE, ids=lambda value: str(value)[:60])
def test_flags_that_conflict_are_refused_by_name(flags: dict[str, Any], wanted: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse(layout_conflicts(ServerConfig(model_path="m", **flags)))

    assert all(text in str(caught.value) for text in wanted), str(caught.value)


@pytest.mark.parametrize(("flags", "wanted"), ILLEGAL_FOR_THE_MODEL, ids=lambda value: str(value)[:60])
def test_layouts_that_do_not_divide_the_model_are_refused(flags: dict[str, Any], wanted: tuple[str, ...]) -> None:
    config = ServerConfig(model_path="m", **flags)
    refuse(layout_conflicts(config))

    with pytest.raises(ConfigError) as caught:
        refuse(model_conflicts(config, SHAPE))

    assert all(text in str(caught.value) for text in wanted), str(caught.value)


def test_all_conflicts_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse(layout_conflicts(ServerConfig(model_path="m", tp_size=8, dp_size=3, ep_size=5, nnodes=3)))

    assert len(str(caught.value).splitlines()) == 1 + 5


@pytest.mark.parametrize("tp", [1, 2, 4, 6, 12])
def test_every_remedy_that_names_a_dp_size_is_legal(tp: int) -> None:
    for dp in range(1, 2 * tp):
        config = ServerConfig(model_path="m", tp_size=tp, dp_size=dp, enable_dp_attention=True)
        for conflict in layout_conflicts(config):
            for value in conflict.remedy.split("--dp-size ")[1:]:
                legal = ServerConfig(model_path="m", tp_size=tp, dp_size=int(value.split()[0]), enable_dp_attention=True)
                assert not list(layout_conflicts(legal))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"tp_size": 4},
        {"tp_size": 4, "ep_size": 2},
        {"moe_a2a_backend": "torch"},
        {"tp_size": 4, "dp_size": 2, **DP, "moe_dense_tp_size": 1, "enable_dp_lm_head": True},
        {"tp_size": 12, "dp_size": 4, **DP, "moe_a2a_backend": "torch", "ep_size": 12},
        {"tp_size": 4, "nnodes": 2, "node_rank": 1, "dist_init_addr": "h:1"},
        {"tp_size": 16, "dp_size": 16, **DP, "moe_a2a_backend": "torch", "ep_num_redundant_experts": 8},
    ],
)
def test_legal_layouts_pass(flags: dict[str, Any]) -> None:
    config = ServerConfig(model_path="m", **flags)

    assert not [*layout_conflicts(config), *model_conflicts(config, SHAPE)]
