"""Quantisation, SwiGLU and norms in Triton are what float64 says, rounded once; a row's result never depends on other rows."""

from __future__ import annotations

import pytest
import torch
from device_kernels import FLOATS, assert_close, assert_quantized, on_each_device, random, same_bits, twice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.activation import (
    swiglu_quantize_masked_reference,
    swiglu_quantize_reference,
    swiglu_reference,
)
from moesaic.kernels.norm import add_rms_norm_quantize_reference, rms_norm_quantize_reference, rms_norm_reference
from moesaic.kernels.quant import (
    dequantize_blocks_reference,
    dequantize_per_token_reference,
    quantize_blocks_reference,
    quantize_per_token_reference,
)
from moesaic.kernels.triton import activation, norm, quant

ROWS, WIDTHS, SEEDS = st.integers(0, 19), st.sampled_from([1, 7, 64, 128, 200, 640]), st.integers(0, 2**31)
DTYPES = st.sampled_from(FLOATS)


@on_each_device
@settings(max_examples=20, deadline=None)
@given(rows=ROWS, width=WIDTHS, magnitude=st.sampled_from([1e-3, 1.0, 3e4]), dtype=DTYPES, mn_major=st.booleans(), seed=SEEDS)
def test_activations_are_quantised_within_half_a_step(
    *, device: str, rows: int, width: int, magnitude: float, dtype: torch.dtype, mn_major: bool, seed: int
) -> None:
    x = (random(rows, width, seed=seed) * magnitude).clamp(-6e4, 6e4).to(dtype).to(device)
    for quantized, scales in (
        twice(lambda: quant.quantize_per_token(x, mn_major_scales=mn_major)),
        quantize_per_token_reference(x, mn_major_scales=mn_major),
    ):
        assert_quantized(quantized, scales, x.double())
        if mn_major and rows:
            assert scales.stride() == (1, -(-rows // 4) * 4), "not the layout that DeepGEMM wants"
    back = twice(lambda: quant.dequantize_per_token(quantized, scales, dtype))
    assert torch.equal(back, dequantize_per_token_reference(quantized, scales, dtype))


@on_each_device
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), dtype=DTYPES, seed=SEEDS, data=st.data())
def test_weights_are_quantised_per_block_and_slices_come_back(
    *, device: str, rows: int, columns: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    weight = random(rows, columns, seed=seed, dtype=dtype, device=device)
    quantized, scales = twice(lambda: quant.quantize_blocks(weight))
    expected, expected_scales = quantize_blocks_reference(weight)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(quantized.float(), expected.float(), rtol=2**-3, atol=2**-9)  # a step where a tie was near
    assert (quantized.float() != expected.float()).float().mean() < 0.02
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    part, touched = quantized[top:, left:], scales[top // 128 :, left // 128 :].contiguous()
    offsets = {"row_offset": top % 128, "column_offset": left % 128}
    back = twice(lambda: quant.dequantize_blocks(part, touched, dtype, **offsets))
    assert torch.equal(back, dequantize_blocks_reference(part, touched, dtype, **offsets))


@on_each_device
@settings(max_examples=20, deadline=None)
@given(rows=ROWS, width=WIDTHS, dtype=DTYPES, seed=SEEDS)
def test_swiglu_is_rounded_once(*, device: str, rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = random(rows, 2 * width, seed=seed, dtype=dtype, device=device) * 3
    exact = swiglu_reference(gate_up.double())
    assert_close(twice(lambda: activation.swiglu(gate_up)), exact)
    for quantized, scales in (
        twice(lambda: activation.swiglu_quantize(gate_up, mn_major_scales=True)),
        swiglu_quantize_reference(gate_up, mn_major_scales=True),
    ):
        assert_quantized(quantized, scales, exact)


@on_each_device
@settings(max_examples=20, deadline=None)
@given(experts=st.integers(1, 4), room=st.integers(0, 9), width=WIDTHS, dtype=DTYPES, seed=SEEDS, data=st.data())
def test_masked_swiglu_computes_the_valid_rows_and_touches_no_other(
    *, device: str, experts: int, room: int, width: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    gate_up = random(experts, room, 2 * width, seed=seed, dtype=dtype, device=device)
    counts = data.draw(st.lists(st.integers(0, room), min_size=experts, max_size=experts))
    count_tensor = torch.tensor(counts, device=device)
    quantized, scales = twice(lambda: activation.swiglu_quantize_masked(gate_up, count_tensor, mn_major_scales=True))
    reference = swiglu_quantize_masked_reference(gate_up, count_tensor, mn_major_scales=True)
    for expert, count in enumerate(counts):
        exact = swiglu_reference(gate_up[expert, :count].double())
        assert_quantized(quantized[expert, :count], scales[expert, :count], exact)
        assert_quantized(reference[0][expert, :count], reference[1][expert, :count], exact)
        assert scales[expert, count:].isnan().all(), "a padding row was written"


@on_each_device
def test_contiguous_swiglu_skips_padding_rows(device: str) -> None:
    gate_up = random(9, 400, seed=3, device=device)
    row_expert = torch.tensor([0, 0, -1, -1, 1, 2, 2, -1, -1], device=device, dtype=torch.int32)
    quantized, scales = twice(lambda: activation.swiglu_quantize(gate_up, row_expert=row_expert))
    valid = row_expert >= 0
    assert_quantized(quantized[valid], scales[valid], swiglu_reference(gate_up.double())[valid])
    assert scales[~valid].isnan().all(), "a padding row was written"


@on_each_device
@settings(max_examples=20, deadline=None)
@given(rows=ROWS, width=WIDTHS, extra=st.integers(0, 3), dtype=DTYPES, seed=SEEDS)
def test_norms_are_rounded_once(*, device: str, rows: int, width: int, extra: int, dtype: torch.dtype, seed: int) -> None:
    x = random(rows, width + extra, seed=seed, dtype=dtype, device=device)[:, :width]
    weight = random(width, seed=seed + 1, dtype=dtype, device=device)
    exact = rms_norm_reference(x.double(), weight.double(), 1e-6)
    assert_close(twice(lambda: norm.rms_norm(x, weight, 1e-6)), exact)
    for quantized, scales in (
        twice(lambda: norm.rms_norm_quantize(x, weight, 1e-6)),
        rms_norm_quantize_reference(x, weight, 1e-6),
    ):
        assert_quantized(quantized, scales, exact)


@on_each_device
@settings(max_examples=20, deadline=None)
@given(rows=ROWS, width=WIDTHS, dtype=DTYPES, seed=SEEDS)
def test_norms_see_the_rounded_sum_of_a_residual(*, device: str, rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x, residual = (random(rows, width, seed=seed + i, dtype=dtype, device=device) for i in range(2))
    weight = random(width, seed=seed + 2, dtype=dtype, device=device)
    exact = rms_norm_reference((x + residual).double(), weight.double(), 1e-6)
    normed, total = twice(lambda: norm.add_rms_norm(x, residual, weight, 1e-6))
    assert torch.equal(total, x + residual)
    assert_close(normed, exact)
    for quantized, scales, total in (
        twice(lambda: norm.add_rms_norm_quantize(x, residual, weight, 1e-6, mn_major_scales=True)),
        add_rms_norm_quantize_reference(x, residual, weight, 1e-6, mn_major_scales=True),
    ):
        assert torch.equal(total, x + residual)
        assert_quantized(quantized, scales, exact)


def _row_operations(x: Tensor) -> list[Tensor]:
    """Every result of every operation on the rows of x, one row of it per row of x."""
    gamma = random(x.shape[1], seed=7, dtype=x.dtype).to(x.device)
    return [
        *quant.quantize_per_token(x, mn_major_scales=True),
        activation.swiglu(x),
        *activation.swiglu_quantize(x),
        norm.rms_norm(x, gamma, 1e-6),
        *norm.add_rms_norm_quantize(x, x.flip(1).contiguous(), gamma, 1e-6),
    ]


@on_each_device
def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    x = random(13, 400, seed=5, dtype=torch.bfloat16, device=device)
    whole, part = _row_operations(x), _row_operations(x[4:11].contiguous())
    for all_rows, some_rows in zip(whole, part, strict=True):
        assert same_bits(all_rows[4:11], some_rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quant.quantize_per_token(x.double()), "x is float64, wanted bfloat16 or float16 or float32"),
        (lambda x: quant.quantize_per_token(x[0]), r"x has shape \[8\], wanted \[any, any\]"),
        (lambda x: quant.quantize_per_token(x.t()), r"x has strides \[1, 8\], wanted 1 in the last"),
        (lambda x: quant.dequantize_per_token(x.to(quant.FP8), x, torch.float32), r"scales is torch.float32 \[4, 8\]"),
        (lambda x: quant.dequantize_blocks(x, x, torch.float32), "quantized is float32, wanted float8_e4m3fn"),
        (lambda x: activation.swiglu(x[:, :5]), "gate_up is torch.float32"),
        (lambda x: activation.swiglu_quantize(x[:, :5].contiguous()), "gate_up has 5 columns, wanted an even number"),
        (lambda x: activation.swiglu_quantize(x, row_expert=x[0].long()), r"row_expert has shape \[8\], wanted \[4\]"),
        (lambda x: activation.swiglu_quantize_masked(x[None], x[:1, 0]), "counts is float32, wanted int64 or int32"),
        (lambda x: norm.rms_norm(x, x[0, :3], 1e-6), r"weight has shape \[3\], wanted \[8\]"),
        (lambda x: norm.add_rms_norm(x, x.half(), x[0], 1e-6), "residual is float16, wanted float32"),
        (lambda x: norm.rms_norm(x.new_zeros(1, 2**15), x.new_zeros(2**15), 1e-6), "x has 32768 columns, wanted at most"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(random(4, 8, seed=0))  # type: ignore[operator]
