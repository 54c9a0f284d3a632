"""Rotary embedding on a GPU, and the KV write that carries it: normalised latent and rotated key into the rows of a paged pool.

Pairs lie side by side and stay where they are. An FP8 pool holds e4m3 values times one scale for the whole pool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.checks import FLOATS, check_tensor
from moesaic.kernels.latent_write import check_kv_scale
from moesaic.kernels.quant import FP8
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two

HEADS_AT_ONCE = 16


@triton.jit
def _rotate(pairs: tl.tensor, angles: tl.tensor, position: tl.tensor, HALF: tl.constexpr, HALF_PADDED: tl.constexpr) -> tl.tensor:
    """pairs fp32 [N, P, 2] times the complex numbers of one position."""
    pair = tl.arange(0, HALF_PADDED)
    place = angles + (position * HALF + pair) * 2
    cosine = tl.load(place, mask=pair < HALF, other=0.0)[None, :]
    sine = tl.load(place + 1, mask=pair < HALF, other=0.0)[None, :]
    real, imaginary = tl.split(pairs)
    return tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)


@triton.jit(do_not_specialize=["num_heads"])
def _rope_kernel(
    x: tl.tensor,
    angles: tl.tensor,
    positions: tl.tensor,
    num_heads: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None, None]
    pair, part = tl.arange(0, HALF_PADDED)[None, :, None], tl.arange(0, 2)[None, None, :]
    at = x + token * token_stride + heads * head_stride + pair * 2 + part
    valid = (heads < num_heads) & (pair < HALF) & (part < 2)
    pairs = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    rotated = _rotate(pairs, angles, tl.load(positions + token), HALF, HALF_PADDED)
    tl.store(at, rotated.to(x.dtype.element_ty), mask=valid)


def apply_rope(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """As `kernels.rope.apply_rope`."""
    check_tensor("apply_rope", "x", x, shape=(None, None, None), dtypes=FLOATS)
    num_tokens, num_heads, dim = x.shape
    _check_rotation("apply_rope", x, table, positions, num_tokens, dim)
    if x.numel():
        heads = min(HEADS_AT_ONCE, power_of_two(num_heads))
        launch(
            _rope_kernel,
            (num_tokens, ceil_div(num_heads, heads)),
            x=x,
            angles=torch.view_as_real(table),
            positions=positions,
            num_heads=num_heads,
            token_stride=x.stride(0),
            head_stride=x.stride(1),
            HALF=dim // 2,
            HALF_PADDED=power_of_two(dim // 2),
            HEADS=heads,
        )
    return x


def _check_rotation(function: str, x: Tensor, table: Tensor, positions: Tensor, num_tokens: int, dim: int) -> None:
    if dim % 2:
        raise ValueError(f"{function}: x has {dim} dimensions to rotate, wanted an even number")
    shape = (None, dim // 2)
    check_tensor(function, "table", table, shape=shape, dtypes=(torch.complex64,), like=x, contiguous=True)
    check_tensor(function, "positions", positions, shape=(num_tokens,), dtypes=(torch.int64,), like=x)


@triton.jit
def _write_kernel(
    projected: tl.tensor,
    norm: tl.tensor,
    angles: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    pool: tl.tensor,
    projected_stride: tl.tensor,
    pool_stride: tl.tensor,
    eps: tl.tensor,
    inverse_scale: tl.tensor,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    source = projected + token * projected_stride
    target = pool + tl.load(slots + token) * pool_stride
    columns = tl.arange(0, WIDTH_PADDED)
    inside = columns < WIDTH
    latent = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(latent * latent, axis=0) / WIDTH
    normed = latent * tl.rsqrt(mean + eps) * tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + columns, (normed * inverse_scale).to(pool.dtype.element_ty), mask=inside)

    pair, part = tl.arange(0, HALF_PADDED)[None, :, None], tl.arange(0, 2)[None, None, :]
    places = WIDTH + pair * 2 + part
    valid = (pair < HALF) & (part < 2)
    key = tl.load(source + places, mask=valid, other=0.0).to(tl.float32)
    rotated = _rotate(key, angles, tl.load(positions + token), HALF, HALF_PADDED)
    tl.store(target + places, (rotated * inverse_scale).to(pool.dtype.element_ty), mask=valid)


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
    """As `kernels.latent_write.write_latent`."""
    function = "write_latent"
    check_tensor(function, "projected", projected, shape=(None, None), dtypes=FLOATS)
    num_tokens, both = projected.shape
    check_tensor(function, "norm", norm, shape=(None,), dtypes=FLOATS, like=projected)
    width = norm.shape[0]
    _check_rotation(function, projected, table, positions, num_tokens, both - width)
    check_tensor(function, "slots", slots, shape=(num_tokens,), dtypes=(torch.int64,), like=projected)
    check_tensor(function, "pool_rows", pool_rows, shape=(None, both), dtypes=(*FLOATS, FP8), like=projected)
    check_kv_scale(function, kv_scale, pool_rows)
    if num_tokens:
        launch(
            _write_kernel,
            (num_tokens,),
            projected=projected,
            norm=norm,
            angles=torch.view_as_real(table),
            positions=positions,
            slots=slots,
            pool=pool_rows,
            projected_stride=projected.stride(0),
            pool_stride=pool_rows.stride(0),
            eps=eps,
            inverse_scale=1.0 / kv_scale,
            WIDTH=width,
            WIDTH_PADDED=power_of_two(width),
            HALF=(both - width) // 2,
            HALF_PADDED=power_of_two((both - width) // 2),
        )
