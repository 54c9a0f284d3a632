"""The KV write of MLA: normalised latent and rotated key, scattered into the rows of a paged pool."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.gpu import uses_triton
from moesaic.kernels.native.library import kernels_for
from moesaic.kernels.norm import rms_norm_reference
from moesaic.kernels.quant import FP8, FP8_MAX
from moesaic.kernels.rope import apply_rope_reference


def write_latent(
    projected: Tensor,
    norm: Tensor,
    eps: float,
    *,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool_rows: Tensor,
    kv_scale: float = 1.0,
) -> None:
    """projected [T, C + R] (latent of C elements, rotary key) into rows `slots` int64 [T], distinct, of pool_rows [S, C + R].

    The latent is normalised (norm [C]), the key rotated by rows `positions` int64 [T] of table complex64 [num_positions, R / 2].
    A pool in FP8 (e4m3) holds the rows divided by `kv_scale`, rounded once, from fp32; elsewhere `kv_scale` stays 1.
    Raises ValueError on a device.
    """
    if uses_triton(projected):
        from moesaic.kernels.triton import rope as device

        device.write_latent(
            projected, norm, eps, table=table, positions=positions, slots=slots, pool_rows=pool_rows, kv_scale=kv_scale
        )
        return
    native = kernels_for(projected)
    if native is None or kernels_for(pool_rows) is None or projected.stride(1) != 1:
        write_latent_reference(
            projected, norm, eps, table=table, positions=positions, slots=slots, pool_rows=pool_rows, kv_scale=kv_scale
        )
        return
    width = norm.shape[0]
    native.write_latent(
        projected.data_ptr(),
        projected.stride(0),
        norm.data_ptr(),
        eps,
        width,
        projected.shape[1] - width,
        table.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        len(slots),
        pool_rows.data_ptr(),
    )


def check_kv_scale(function: str, kv_scale: float, pool_rows: Tensor) -> None:
    """Refuse a scale that an FP8 pool can't be divided by, and any but 1 for other pools. Raises ValueError."""
    if pool_rows.dtype is not FP8 and kv_scale != 1.0:
        kind = str(pool_rows.dtype).removeprefix("torch.")
        raise ValueError(f"{function}: kv_scale is {kv_scale} for a pool in {kind}, wanted 1: only an FP8 pool is scaled")
    if not 0.0 < kv_scale < float("inf"):
        raise ValueError(f"{function}: kv_scale is {kv_scale}, wanted a finite number above 0")


def write_latent_reference(
    projected: Tensor,
    norm: Tensor,
    eps: float,
    *,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    pool_rows: Tensor,
    kv_scale: float = 1.0,
) -> None:
    """The same in torch, any device and dtype."""
    if pool_rows.dtype is FP8:
        projected, norm = projected.float(), norm.float()
    latent, key = torch.split(projected, [norm.shape[0], projected.shape[1] - norm.shape[0]], dim=1)
    rotated = apply_rope_reference(key.unsqueeze(1), table, positions).squeeze(1)
    rows = torch.cat([rms_norm_reference(latent, norm, eps), rotated], dim=1)
    if pool_rows.dtype is FP8:
        rows = (rows / kv_scale).clamp(-FP8_MAX, FP8_MAX)
    pool_rows.view(torch.uint8).index_copy_(0, slots, rows.to(pool_rows.dtype).view(torch.uint8))
