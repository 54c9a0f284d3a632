"""Rotary position embedding on interleaved pairs, with YaRN's frequencies (Su et al., 2021; Peng et al., 2023).

DeepSeek's checkpoints pair neighbouring dimensions (x0, x1), (x2, x3), ... We rotate each pair as one complex number and leave it
where it is; the order of dimensions doesn't matter to the dot product as long as queries and keys agree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.kernels.gpu import uses_triton
from moesaic.kernels.native.library import kernels_for
from moesaic.kernels.rope_config import RopeConfig, yarn_mscale


def rope_frequencies(config: RopeConfig) -> Tensor:
    """Angular frequency of each pair, fp32 [dim / 2]."""
    exponents = torch.arange(0, config.dim, 2, dtype=torch.float32) / config.dim
    plain = 1.0 / (config.theta**exponents)
    if config.factor is None:
        return plain

    def boundary(num_rotations: float) -> float:
        ratio = config.original_max_position / (num_rotations * 2 * math.pi)
        return config.dim * math.log(ratio) / (2 * math.log(config.theta))

    low = max(math.floor(boundary(config.beta_fast)), 0)
    high = min(math.ceil(boundary(config.beta_slow)), config.dim - 1)
    ramp = (torch.arange(config.dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    return plain / config.factor * stretched + plain * (1 - stretched)


def rope_table(config: RopeConfig, num_positions: int) -> Tensor:
    """complex64 [num_positions, dim / 2]: the rotation of each pair at each position, YaRN's magnitude included."""
    magnitude = 1.0
    if config.factor is not None:
        if config.attention_factor is not None:
            magnitude = config.attention_factor
        elif config.mscale and config.mscale_all_dim:
            magnitude = yarn_mscale(config.factor, config.mscale) / yarn_mscale(config.factor, config.mscale_all_dim)
        else:
            magnitude = yarn_mscale(config.factor, 1.0)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), rope_frequencies(config))
    return torch.polar(torch.full_like(angles, magnitude), angles)


def apply_rope(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """x [T, heads, dim], rotated in place by the rows `positions` int64 [T] of a table complex64 [num_positions, dim / 2].

    The multiplication is fp32. Returns x. Raises ValueError on a device.
    """
    if uses_triton(x):
        from moesaic.kernels.triton import rope as device

        return device.apply_rope(x, table, positions)
    native = kernels_for(x)
    if native is None or x.stride(2) != 1:
        return x.copy_(apply_rope_reference(x, table, positions))
    native.rope_in_place(x.data_ptr(), x.stride(0), x.stride(1), table.data_ptr(), positions.data_ptr(), *x.shape)
    return x


def apply_rope_reference(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """The same in torch, any device and dtype; leaves x as it is."""
    rotation = table.index_select(0, positions)
    whole = x.float().clone(memory_format=torch.contiguous_format)  # complex numbers begin at even places, a view may not
    pairs = torch.view_as_complex(whole.view(*x.shape[:-1], x.shape[-1] // 2, 2))
    return torch.view_as_real(pairs * rotation.unsqueeze(1)).flatten(-2).to(x.dtype)
