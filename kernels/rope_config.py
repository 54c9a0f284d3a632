"""The numbers of rotary position embedding, with YaRN's (Peng et al., 2023), as a model's config.json gives them.

Knows no tensors: whoever only reads a configuration need not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """`factor` None means plain rope; else YaRN's constants as in config.json."""

    dim: int
    theta: float
    factor: float | None = None
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature 0.1 * mscale * ln(factor) + 1 (1 where the context isn't stretched)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
