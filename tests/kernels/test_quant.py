"""FP8 quantisation: error bounds of a round trip, ragged blocks, zero tokens, and slices of a block-quantised weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.gemm import BlockWeight, linear
from moesaic.kernels.quant import (
    BLOCK,
    FP8,
    FP8_MAX,
    dequantize_blocks,
    dequantize_per_token,
    quantize_blocks,
    quantize_per_token,
    round_to_fp8,
)

RELATIVE = 2**-4
"""Half a unit in the last place of e4m3: 3 mantissa bits."""
SUBNORMAL = 2**-10
"""Half of e4m3's smallest step, in units of the scale."""

SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**31)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ceil(size: int) -> int:
    return -(-size // BLOCK)


def _within_half_a_step(back: Tensor, x: Tensor, scales: Tensor) -> bool:
    bound = torch.maximum(x.abs() * RELATIVE, scales * SUBNORMAL) * (1 + 1e-5)
    return bool(((back - x).abs() <= bound).all())


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(0, 9), width=SIZES, magnitude=st.sampled_from([1e-3, 1.0, 1e4]), seed=SEEDS)
def test_activations_come_back_within_half_a_step(num_tokens: int, width: int, magnitude: float, seed: int) -> None:
    x = _random(num_tokens, width, seed=seed) * magnitude
    quantized, scales = quantize_per_token(x)
    assert quantized.dtype == FP8
    assert quantized.shape == x.shape
    assert scales.shape == (num_tokens, _ceil(width))
    back = dequantize_per_token(quantized, scales, torch.float32)
    assert _within_half_a_step(back, x, scales.repeat_interleave(BLOCK, 1)[:, :width])


@settings(max_examples=30, deadline=None)
@given(rows=SIZES, columns=SIZES, seed=SEEDS)
def test_weights_come_back_within_half_a_step_also_in_ragged_blocks(rows: int, columns: int, seed: int) -> None:
    weight = _random(rows, columns, seed=seed)
    quantized, scales = quantize_blocks(weight)
    assert scales.shape == (_ceil(rows), _ceil(columns))
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    assert _within_half_a_step(dequantize_blocks(quantized, scales, torch.float32), weight, spread)


@settings(max_examples=40, deadline=None)
@given(rows=SIZES, columns=SIZES, seed=SEEDS, data=st.data())
def test_a_dequantised_slice_is_the_slice_of_the_dequantised_whole(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    quantized, scales = quantize_blocks(_random(rows, columns, seed=seed))
    whole = dequantize_blocks(quantized, scales, torch.float32)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, columns))
    part = dequantize_blocks(
        quantized[top:bottom, left:right],
        scales[top // BLOCK : _ceil(bottom), left // BLOCK : _ceil(right)],
        torch.float32,
        row_offset=top % BLOCK,
        column_offset=left % BLOCK,
    )
    assert torch.equal(part, whole[top:bottom, left:right])


def test_the_largest_value_of_each_block_uses_the_full_range() -> None:
    quantized, _ = quantize_per_token(_random(4, 2 * BLOCK))
    peaks = quantized.float().view(4, 2, BLOCK).abs().amax(-1)
    assert torch.equal(peaks, torch.full((4, 2), FP8_MAX))


def test_each_block_has_its_own_scale() -> None:
    x = torch.cat([torch.full((1, BLOCK), 1e-3), torch.full((1, BLOCK), 1e3)], dim=1)
    torch.testing.assert_close(round_to_fp8(x), x)


def test_zeros_stay_zeros() -> None:
    assert torch.equal(round_to_fp8(torch.zeros(2, 200)), torch.zeros(2, 200))
    quantized, scales = quantize_blocks(torch.zeros(130, 5))
    assert torch.equal(dequantize_blocks(quantized, scales, torch.float32), torch.zeros(130, 5))


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(0, 5), width=SIZES, seed=SEEDS)
def test_rounding_twice_is_rounding_once(num_tokens: int, width: int, seed: int) -> None:
    once = round_to_fp8(_random(num_tokens, width, seed=seed))
    torch.testing.assert_close(round_to_fp8(once), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 200), (3, 0, 128), (0, 2, 64)])
def test_rounding_keeps_the_shape_of_no_tokens(shape: tuple[int, ...]) -> None:
    assert round_to_fp8(torch.empty(shape)).shape == shape


def test_rounding_keeps_dtype_and_shape_and_rounds_each_row_alone() -> None:
    x = _random(2, 3, 150)
    rounded = round_to_fp8(x)
    assert rounded.shape == x.shape
    assert torch.equal(rounded[1, 2:], round_to_fp8(x[1, 2:]))
    assert round_to_fp8(x.bfloat16()).dtype == torch.bfloat16


def test_an_fp8_product_rounds_its_activations_and_a_plain_one_does_not() -> None:
    x, weight = _random(3, 150), _random(7, 150, seed=1)
    rounded = linear(x, weight, fp8_activations=True).double()
    torch.testing.assert_close(rounded, round_to_fp8(x).double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x, weight).double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
    assert (rounded - x.double() @ weight.double().t()).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(5, 256, 384), (3, 200, 192), (0, 128, 128)])
def test_a_weight_that_stays_in_fp8_gives_the_product_of_its_dequantised_twin(shape: tuple[int, int, int]) -> None:
    num_tokens, rows, columns = shape
    x, (values, scales) = _random(num_tokens, columns), quantize_blocks(_random(rows, columns, seed=1))
    product = linear(x, BlockWeight(values=values, scales=scales))
    twin = linear(x, dequantize_blocks(values, scales, torch.float32), fp8_activations=True)
    assert product.shape == (num_tokens, rows)
    torch.testing.assert_close(product, twin, rtol=1e-4, atol=1e-4)


def test_a_weight_in_fp8_takes_any_leading_dimensions() -> None:
    values, scales = quantize_blocks(_random(128, 128, seed=1))
    weight, x = BlockWeight(values=values, scales=scales), _random(6, 128)
    assert torch.equal(linear(x.view(2, 3, 128), weight), linear(x, weight).view(2, 3, 128))
