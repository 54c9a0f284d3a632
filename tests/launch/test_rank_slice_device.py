"""The slice of benchmarks/rank_slice.py as a GPU would run it, without one: on meta tensors of the real sizes."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import interpreter  # noqa: F401  before anything that imports Triton
import pytest
import torch
from torch import Tensor

from moesaic import kernels
from moesaic.kernels.triton.launch import recorded
from moesaic.moe.dispatch_mode import DispatchMode

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from slice_cases import DEEPSEEK_V3, all_cases
from slice_dispatcher import LoopbackGroup
from slice_model import WeightMaker, build_slice
from slice_run import SliceStep
from slice_wire import HostWire

CPU, META = torch.device("cpu"), torch.device("meta")


class ShapesOnly(LoopbackGroup):
    """A group on torch's meta device: what arrives is drawn on the CPU, and of it only shapes are handed out."""

    def arrivals(self, mode: DispatchMode, num_tokens: int, layer: int) -> Any:
        self.device = CPU
        drawn = super().arrivals(mode, num_tokens, layer)
        self.device = META
        return _without_values(drawn)


def _without_values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(META)
    if not is_dataclass(value):
        return value
    return type(value)(**{field.name: _without_values(getattr(value, field.name)) for field in fields(value)})


class UnsplitStep(SliceStep):
    """Splitting looks at values."""

    def _halves(self, batch: Any) -> Any:
        return None


@pytest.mark.parametrize("words", ["decode EP72 256 x 2048", "decode EP72 256 x 2048 balancedness 0.5", "prefill EP32 4096 x 2048"])
def test_on_a_gpu_every_kernel_takes_what_the_real_sizes_give_it(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed: front functions check their arguments and write down the launches instead of making them."""
    for found in pkgutil.iter_modules(kernels.__path__, "moesaic.kernels."):
        if not found.ispkg and found.name != "moesaic.kernels.gpu":
            module = importlib.import_module(found.name)
            if hasattr(module, "uses_triton"):
                monkeypatch.setattr(module, "uses_triton", lambda x: x.device == META)
    case = next(case for case in all_cases() if case.name == words)
    config = replace(DEEPSEEK_V3, num_hidden_layers=4)
    place = case.place(config)
    maker = WeightMaker(config, torch.bfloat16, META, None, fp8_gemm="triton")
    weights = maker.make(num_slots=place.num_local, max_positions=8192)
    group = ShapesOnly(
        place=place,
        wire=HostWire(),
        counts=lambda num_tokens, pattern: [],
        seconds=lambda direction, mode, tokens: 0.0,
        device=META,
        runner="triton",
    )
    step = UnsplitStep(config, case, group, dtype=torch.bfloat16)
    with recorded() as launches:
        logits = build_slice(config, weights, group).forward(step.inputs, step.pool)
    assert logits.shape == (case.share(config).num_logits, config.vocab_size)
    names = [launch.kernel.fn.__name__ for launch in launches]
    # Four layers' down, query and output products, three dense layers' two, the shared and the routed experts' two.
    assert names.count("_grouped_kernel") == 4 * 3 + 3 * 2 + 2 + 2
    assert "_swiglu_kernel" not in names, "what lies between two products is made in FP8"
    quantized = sum(launch.arguments["QUANTIZES"] for launch in launches if launch.kernel.fn.__name__ == "_rms_norm_kernel")
    assert quantized == 4 * 2 + 3, "what enters the projections, and dense layers, comes from its norm in FP8"
    assert names.count("_split_kernel" if case.phase == "decode" else "_prefill_kernel") == 4
