"""Ranks share a GPU only where that was asked for, and then the report says how they talk and what they can't have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moesaic.launch.config import ServerConfig
from moesaic.launch.engine.memory import sharers
from moesaic.launch.errors import ConfigError
from moesaic.launch.hardware import Hardware
from moesaic.launch.report import Choice
from moesaic.launch.resolution import Resolution, resolve
from moesaic.launch.topology import ModelShape

SHAPE = ModelShape(
    num_heads=8,
    num_experts=16,
    moe_intermediate_size=128,
    intermediate_size=256,
    vocab_size=512,
    context_length=1024,
    fp8_checkpoint=True,
)
ONE_GPU = Hardware(num_cores=16, num_cuda_devices=1)
DP4: dict[str, Any] = {"tp_size": 4, "dp_size": 4, "enable_dp_attention": True, "moe_a2a_backend": "torch"}


def settle(hardware: Hardware = ONE_GPU, **flags: Any) -> Resolution:
    return resolve(ServerConfig(model_path="m", **DP4 | flags), SHAPE, hardware)


def choice(resolution: Resolution, capability: str) -> Choice:
    return next(each for each in resolution.choices if each.capability == capability)


def test_four_ranks_share_one_gpu_and_talk_through_host_memory() -> None:
    shared = settle(ranks_per_gpu=4)
    assert (shared.config.device, shared.config.communication_backend, shared.config.ranks_per_gpu) == ("cuda", "staged", 4)
    talk = choice(shared, "communication")
    assert talk.chosen.startswith("gloo through host memory: 4 ranks share a GPU")
    assert talk.refused == (("nccl", "--ranks-per-gpu 4: it takes one rank per GPU"),)
    assert not talk.downgrade, "it was asked for"


def test_a_steps_graph_can_not_hold_messages_through_host_memory() -> None:
    flags: dict[str, Any] = {"moe_a2a_backend": "symm", "quantization": "fp8"}
    assert settle(replace(ONE_GPU, num_cuda_devices=4), **flags).config.cuda_graph_rows
    shared = settle(**flags, ranks_per_gpu=4)
    assert not shared.config.cuda_graph_rows
    assert "messages pass through host memory" in choice(shared, "CUDA graphs").refused[0][1]


@pytest.mark.parametrize(
    ("flags", "hardware", "words"),
    [
        ({"device": "cuda"}, ONE_GPU, "4 ranks per node, and torch sees 1 CUDA devices (--ranks-per-gpu 4 makes ranks share"),
        ({"device": "cuda", "ranks_per_gpu": 2}, ONE_GPU, "4 ranks per node, 2 of them on a GPU, and torch sees 1 CUDA devices"),
        ({"ranks_per_gpu": 4}, Hardware(num_cores=4), "--ranks-per-gpu 4: the device is cpu, which all ranks share anyway"),
        ({"ranks_per_gpu": 4, "moe_a2a_backend": "deepep"}, ONE_GPU, "DeepEP takes one rank per GPU"),
    ],
)
def test_what_can_not_be_shared_is_refused(flags: dict[str, Any], hardware: Hardware, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(hardware, **flags)
    assert words in str(caught.value)


def test_each_rank_may_take_its_share_of_the_gpus_memory() -> None:
    for ranks, per_gpu, expected in ((4, 4, 4), (4, 2, 2), (4, 8, 4)):
        shared = settle(replace(ONE_GPU, num_cuda_devices=4), tp_size=ranks, dp_size=ranks, ranks_per_gpu=per_gpu)
        assert sharers(shared.config, shared.topology) == expected
    alone = settle(replace(ONE_GPU, num_cuda_devices=4))
    assert (alone.config.communication_backend, sharers(alone.config, alone.topology)) == ("nccl", 1)
