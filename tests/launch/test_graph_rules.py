"""CUDA graphs are on where nothing waits on the CPU; where they are off, the report says why and whether that is a loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moesaic.launch.config import ServerConfig
from moesaic.launch.dispatch_limits import StepSizes
from moesaic.launch.errors import ConfigError
from moesaic.launch.graph_rules import choose_graphs
from moesaic.launch.hardware import Hardware
from moesaic.launch.report import Choice
from moesaic.launch.resolution import resolve
from moesaic.launch.topology import ModelShape

SHAPE = ModelShape(
    num_heads=8, num_experts=16, moe_intermediate_size=128, intermediate_size=256, vocab_size=512, context_length=1024
)


def _choose(backend: str = "deepep", num_gpus: int = 8, **flags: Any) -> tuple[tuple[int, ...], Choice]:
    layout: dict[str, Any] = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True, "moe_a2a_backend": "torch"}
    config = ServerConfig(model_path="m", **{**layout, **flags})
    resolution = resolve(config, SHAPE, Hardware(num_cores=8, num_cuda_devices=num_gpus))
    settled = resolution.config
    sizes = StepSizes(running_requests=settled.max_running_requests_per_dp, prompt_tokens=settled.chunked_prefill_tokens_per_dp)
    asked = replace(config, moe_a2a_backend=backend)  # type: ignore[arg-type]
    return choose_graphs(asked, settled.device, settled.dispatch_mode, sizes, resolution.topology)


def test_deepeps_decode_steps_are_captured_up_to_the_dispatch_cap() -> None:
    rows, choice = _choose()

    assert (rows[0], rows[-1]) == (1, 128)
    assert choice.chosen == f"decode steps of 1 to 128 ({len(rows)} sizes) requests per DP rank"
    assert _choose(cuda_graph_max_bs=12)[0] == (1, 2, 4, 8, 12)
    assert _choose(cuda_graph_bs=(4, 1))[0] == (1, 4)
    assert _choose(ep_dispatch_algorithm="balanced")[0] == rows, "replicas are chosen on the device, whatever the algorithm"
    with pytest.raises(ConfigError, match=r"--cuda-graph-bs 200: a DP rank decodes 1 to 128 requests"):
        _choose(cuda_graph_bs=(200,))


@pytest.mark.parametrize(
    ("flags", "reason", "is_loss"),
    [
        ({"num_gpus": 0}, "the device is cpu", False),
        ({"disable_cuda_graph": True}, "--disable-cuda-graph", False),
        ({"backend": "torch"}, "--moe-a2a-backend torch waits on the CPU", True),
        ({"deepep_mode": "normal"}, "normal dispatch waits for counts on the CPU", True),
        ({"deepep_mode": "normal", "disaggregation_mode": "prefill"}, "normal dispatch waits for counts on the CPU", False),
    ],
    ids=str,
)
def test_what_stands_in_the_way_is_said(flags: dict[str, Any], reason: str, is_loss: bool) -> None:
    rows, choice = _choose(**flags)

    assert (rows, choice.chosen, choice.refused, choice.downgrade) == ((), "off", (("on", reason),), is_loss)
