"""Greedy and random tokens on a GPU: tiles of a row find their largest value, a second kernel takes the first largest of the tiles.

The random bits are those of random_bits.py, bit for bit; the noise made from them differs from torch's by roundings.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.random_bits import row_keys
from moesaic.kernels.sampling import MIN_TEMPERATURE, check_logits, check_sampling
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two

TILE = 4096


@triton.jit
def _random_bits(ids: tl.tensor, key: tl.tensor) -> tl.tensor:
    """As `random_bits.random_bits`, on uint32."""
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    bits = ids.to(tl.uint32) * 0x9E3779B9 + low
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD
    bits = (bits ^ (bits >> 15)) * 0xD35A2D97
    bits = bits ^ high
    bits = (bits ^ (bits >> 15)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _gumbel(bits: tl.tensor) -> tl.tensor:
    """-log(-log(1 - u)); log(1 - u) / (1 - u - 1) * -u is exact also where 1 - u rounds (Goldberg, 1991, theorem 4)."""
    uniform = (bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32)
    uniform = tl.minimum(uniform * 4.656612873077393e-10 + 2.3283064365386963e-10, 0.9999999403953552)
    rest = 1.0 - uniform
    lost = 1.0 - rest
    exponential = tl.where(lost > 0, -tl.log(rest) * uniform / tl.where(lost > 0, lost, 1.0), uniform)
    return -tl.log(exponential)


@triton.jit
def _tile_kernel(
    logits: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    places: tl.tensor,
    num_ids: tl.tensor,
    stride: tl.tensor,
    LEAST: tl.constexpr,
    RANDOM: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    score = tl.load(logits + row * stride + ids, mask=ids < num_ids, other=float("-inf")).to(tl.float32)
    score = tl.where(score == score, score, float("inf"))  # noqa: PLR0124  only a NaN differs from itself
    if RANDOM:
        score = (score - tl.load(best + row)) / tl.maximum(tl.load(temperature + row), LEAST)
        score += _gumbel(_random_bits(ids, tl.load(keys + row)))
        score = tl.where(score == score, score, float("-inf"))  # noqa: PLR0124
    most, place = tl.max(score, axis=0, return_indices=True)
    at = row * tl.num_programs(1) + tile
    tl.store(values + at, most)
    tl.store(places + at, tile * TILE + place)


@triton.jit
def _row_kernel(
    values: tl.tensor,
    places: tl.tensor,
    greedy: tl.tensor,
    temperature: tl.tensor,
    tokens: tl.tensor,
    best: tl.tensor,
    num_tiles: tl.tensor,
    LEAST: tl.constexpr,
    RANDOM: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    row, tiles = tl.program_id(0).to(tl.int64), tl.arange(0, TILES)
    found = tl.load(values + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    most, tile = tl.max(found, axis=0, return_indices=True)
    token = tl.load(places + row * num_tiles + tile).to(tl.int64)
    if RANDOM:
        token = tl.where(tl.load(temperature + row) < LEAST, tl.load(greedy + row), token)
    else:
        tl.store(best + row, most)
    tl.store(tokens + row, token)


def greedy_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.sampling.greedy_tokens`."""
    check_logits("greedy_tokens", logits)
    best = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return _largest(logits, best, None, None, None), best


def sample_tokens(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """As `kernels.sampling.sample_tokens`."""
    check_sampling(logits, temperature, seed, position)
    greedy, best = greedy_tokens(logits)
    return _largest(logits, best, greedy, temperature, row_keys(seed, position))


def _largest(logits: Tensor, best: Tensor, greedy: Tensor | None, temperature: Tensor | None, keys: Tensor | None) -> Tensor:
    """The token of each row; fills in `best`, or, with a temperature, draws."""
    num_rows, num_ids = logits.shape
    tile = min(TILE, power_of_two(num_ids))
    num_tiles = ceil_div(num_ids, tile)
    values = logits.new_empty(num_rows, num_tiles, dtype=torch.float32)
    places = torch.empty_like(values, dtype=torch.int32)
    tokens = torch.empty_like(best, dtype=torch.int64)
    is_random = temperature is not None
    launch(
        _tile_kernel,
        (num_rows, num_tiles),
        logits=logits,
        best=best,
        temperature=temperature,
        keys=keys,
        values=values,
        places=places,
        num_ids=num_ids,
        stride=logits.stride(0),
        LEAST=MIN_TEMPERATURE,
        RANDOM=is_random,
        TILE=tile,
        num_warps=8,
    )
    launch(
        _row_kernel,
        (num_rows,),
        values=values,
        places=places,
        greedy=greedy,
        temperature=temperature,
        tokens=tokens,
        best=best,
        num_tiles=num_tiles,
        LEAST=MIN_TEMPERATURE,
        RANDOM=is_random,
        TILES=power_of_two(num_tiles),
        num_warps=1,
    )
    return tokens
