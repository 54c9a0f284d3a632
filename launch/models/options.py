"""How a rank's model is to be built: what `build.py` and `dispatchers.py` are told besides the model's own numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moesaic.eplb.settings import SlotOptions
from moesaic.kernels.grouped_backends import Name
from moesaic.moe.deepep_config import DeepEPSettings
from moesaic.moe.symm_windows import MakeWindows, symmetric_windows


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to run the model. `fp8_activations`: W8A8 arithmetic for an FP8 checkpoint. alignment: rows per expert block, at least.

    `expert_backends`: of the experts' products; the table of kernels/grouped_backends.py chooses if there are several.
    `fp8_weights`: the checkpoint's FP8 matrices stay as stored and compute in FP8, all but kv_b_proj, the experts' by
    `expert_backends` and the others' by `fp8_gemm_backends`; without it W8A8 is simulated with dequantised weights.
    `single_batch_overlap`: steps that run straight overlap communication and computation of one batch. `deepep`: for its backends.
    `max_dispatch_tokens` of a rank in a low-latency step, and `make_windows`: where backend `symm` exchanges them.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    max_positions: int = 4096
    expert_backends: tuple[Name, ...] = ("torch",)
    fp8_gemm_backends: tuple[Name, ...] = ("torch",)
    fp8_weights: bool = False
    fp8_activations: bool = False
    alignment: int = 1
    slots: SlotOptions = field(default_factory=SlotOptions)
    single_batch_overlap: bool = False
    deepep: DeepEPSettings = field(default_factory=DeepEPSettings)
    max_dispatch_tokens: int = 128
    make_windows: MakeWindows = symmetric_windows

    @property
    def for_torch(self) -> bool:
        """Whether torch alone computes the experts."""
        return self.expert_backends == ("torch",)
