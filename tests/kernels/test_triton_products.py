"""Grouped products in Triton are what float64 says, for any counts and either layout, and touch no row that isn't valid."""

from __future__ import annotations

import pytest
import torch
from device_kernels import FLOATS, STEP, on_each_device, random, same_bits, twice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.grouped_gemm import (
    grouped_gemm_fp8_contiguous,
    grouped_gemm_fp8_contiguous_reference,
    grouped_gemm_fp8_masked,
)
from moesaic.kernels.quant import (
    BLOCK,
    dequantize_blocks_reference,
    dequantize_per_token_reference,
    quantize_blocks_reference,
    quantize_per_token_reference,
)
from moesaic.kernels.triton import grouped_gemm

SEEDS = st.integers(0, 2**31)
COUNTS = st.lists(st.sampled_from([0, 1, 5, 70, 130]), min_size=1, max_size=4)


def _exact(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    parts = x.double().split(counts)
    return torch.cat([part @ weight[expert].double().t() for expert, part in enumerate(parts)])


def _assert_product(got: Tensor, exact: Tensor, depth: int) -> None:
    torch.testing.assert_close(got.double(), exact, rtol=STEP[got.dtype], atol=2e-6 * depth + STEP[got.dtype])


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    counts=COUNTS,
    width=st.sampled_from([8, 72, 264]),
    depth=st.sampled_from([16, 136]),
    dtype=st.sampled_from(FLOATS),
    out_fastest=st.booleans(),
    seed=SEEDS,
)
def test_contiguous_products_are_exact_whatever_the_counts(
    *, device: str, counts: list[int], width: int, depth: int, dtype: torch.dtype, out_fastest: bool, seed: int
) -> None:
    x = random(sum(counts), depth, seed=seed, dtype=dtype, device=device)
    weight = random(len(counts), width, depth, seed=seed + 1, dtype=dtype, device=device)
    if out_fastest:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    got = twice(lambda: grouped_gemm.grouped_gemm_contiguous(x, weight, counts))
    _assert_product(got, _exact(x, weight, counts), depth)


@on_each_device
@settings(max_examples=12, deadline=None)
@given(counts=COUNTS, expected=st.sampled_from([None, 4]), dtype=st.sampled_from(FLOATS), seed=SEEDS)
def test_masked_products_are_exact_and_write_valid_rows_only(
    *, device: str, counts: list[int], expected: int | None, dtype: torch.dtype, seed: int
) -> None:
    room, width, depth = 131, 72, 40
    x = random(len(counts), room, depth, seed=seed, dtype=dtype, device=device)
    weight = random(len(counts), width, depth, seed=seed + 1, dtype=dtype, device=device)
    on_device = torch.tensor(counts, device=device)
    got = twice(lambda: grouped_gemm.grouped_gemm_masked(x, weight, on_device, expected_rows=expected))
    for expert, count in enumerate(counts):
        _assert_product(got[expert, :count], x[expert, :count].double() @ weight[expert].double().t(), depth)
        assert got[expert, count:].isnan().all(), "a padding row was written"


def _fp8_weight(experts: int, width: int, depth: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    pairs = [quantize_blocks_reference(random(width, depth, seed=seed + expert)) for expert in range(experts)]
    return torch.stack([q for q, _ in pairs]).to(device), torch.stack([s for _, s in pairs]).to(device)


@on_each_device
@settings(max_examples=12, deadline=None)
@given(counts=COUNTS, width=st.sampled_from([16, 200]), depth=st.sampled_from([128, 272]), mn_major=st.booleans(), seed=SEEDS)
def test_fp8_products_use_every_blocks_scale(
    *, device: str, counts: list[int], width: int, depth: int, mn_major: bool, seed: int
) -> None:
    spread = torch.arange(1, -(-depth // BLOCK) + 1).repeat_interleave(BLOCK)[:depth] ** 3  # blocks of unlike size
    x = random(sum(counts), depth, seed=seed) * spread
    quantized, scales = quantize_per_token_reference(x.to(device), mn_major_scales=mn_major)
    weight, weight_scales = _fp8_weight(len(counts), width, depth, seed, device)
    arguments = (quantized.contiguous(), scales, weight, weight_scales, counts)
    exact = _exact(
        dequantize_per_token_reference(quantized, scales, torch.float64),
        torch.stack([dequantize_blocks_reference(*pair, torch.float64) for pair in zip(weight, weight_scales, strict=True)]),
        counts,
    )
    size = exact.abs().max().item() if exact.numel() else 0.0
    for dtype in (torch.float32, torch.bfloat16):
        for product in (grouped_gemm.grouped_gemm_fp8_contiguous, grouped_gemm_fp8_contiguous_reference):
            got = twice(lambda product=product, dtype=dtype: product(*arguments, out_dtype=dtype))
            torch.testing.assert_close(got.double(), exact, rtol=STEP[dtype], atol=size * 2**-12)


@on_each_device
def test_masked_fp8_products_equal_the_contiguous_ones(device: str) -> None:
    counts, room, depth = [3, 0, 130, 65], 132, 256
    weight, weight_scales = _fp8_weight(4, 200, depth, 1, device)
    rows = random(4 * room, depth, seed=9, device=device)
    quantized, scales = quantize_per_token_reference(rows)
    by_expert = scales.view(4, room, 2).transpose(1, 2).contiguous().transpose(1, 2)
    on_device = torch.tensor(counts, device=device)
    masked = twice(
        lambda: grouped_gemm.grouped_gemm_fp8_masked(
            quantized.view(4, room, depth), by_expert, weight, weight_scales, on_device, out_dtype=torch.float32
        )
    )
    valid = (torch.arange(room) < torch.tensor(counts)[:, None]).to(device)
    picked = valid.flatten()
    contiguous = grouped_gemm.grouped_gemm_fp8_contiguous(
        quantized[picked], scales[picked], weight, weight_scales, counts, out_dtype=torch.float32
    )
    assert same_bits(masked[valid], contiguous)
    assert masked[~valid].isnan().all()


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_row_does_not_depend_on_the_other_rows(device: str, dtype: torch.dtype) -> None:
    depth = 256
    x = random(200, depth, seed=3, device=device)
    if dtype is torch.bfloat16:
        weight = random(2, 72, depth, seed=4, dtype=dtype, device=device)

        def run(rows: Tensor, counts: list[int]) -> Tensor:
            return grouped_gemm.grouped_gemm_contiguous(rows.to(dtype), weight, counts)
    else:
        weight, weight_scales = _fp8_weight(2, 72, depth, 4, device)

        def run(rows: Tensor, counts: list[int]) -> Tensor:
            quantized, scales = quantize_per_token_reference(rows)
            return grouped_gemm.grouped_gemm_fp8_contiguous(
                quantized, scales, weight, weight_scales, counts, out_dtype=torch.float32
            )

    whole = run(x, [150, 50])
    assert same_bits(whole[150:], run(x[150:].contiguous(), [0, 50]))
    assert same_bits(whole[10:150], run(x[10:150].contiguous(), [140, 0]))


def test_the_front_functions_take_fp8_on_a_cpu_too() -> None:
    weight, weight_scales = _fp8_weight(2, 24, 128, 0, "cpu")
    quantized, scales = quantize_per_token_reference(random(8, 128, seed=5))
    exact = grouped_gemm_fp8_contiguous_reference(quantized, scales, weight, weight_scales, [4, 4])
    assert torch.equal(grouped_gemm_fp8_contiguous(quantized, scales, weight, weight_scales, [4, 4]), exact)
    masked = grouped_gemm_fp8_masked(quantized.view(2, 4, 128), scales.view(2, 4, 1), weight, weight_scales, torch.tensor([4, 4]))
    assert torch.equal(masked.view(8, 24), exact)


def _fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: grouped_gemm.grouped_gemm_contiguous(x.double(), w, [4, 4]), "x is float64, wanted bfloat16"),
        (lambda x, w: grouped_gemm.grouped_gemm_contiguous(x, w[..., :8], [4, 4]), r"weight has shape \[2, 24, 8\]"),
        (lambda x, w: grouped_gemm.grouped_gemm_contiguous(x, w.half(), [4, 4]), "weight is torch.float16 on cpu, wanted"),
        (lambda x, w: grouped_gemm.grouped_gemm_contiguous(x, w[:, ::2], [4, 4]), "weight has strides .* without gaps"),
        (
            lambda x, w: grouped_gemm.grouped_gemm_contiguous(x[:, :3].contiguous(), w[..., :3].contiguous(), [4, 4]),
            "weight has rows of 12 bytes .* multiples of 16",
        ),
        (lambda x, w: grouped_gemm.grouped_gemm_masked(x[None], w[:1], x[0, :1]), "counts is float32, wanted int64"),
        (lambda x, w: grouped_gemm_fp8_contiguous(x, x, _fp8(w), w, [4, 4]), "x is float32, wanted float8_e4m3fn"),
        (
            lambda x, w: grouped_gemm_fp8_contiguous(_fp8(x), x, _fp8(w), w, [4, 4]),
            r"x_scales is torch.float32 \[8, 128\] on cpu, wanted torch.float32 \[8, 1\]",
        ),
        (
            lambda x, w: grouped_gemm_fp8_contiguous(_fp8(x), x[:, :1], _fp8(w), w, [4, 4]),
            r"weight_scales has shape \[2, 24, 128\], wanted \[2, 1, 1\]",
        ),
        (
            lambda x, w: grouped_gemm_fp8_contiguous(_fp8(x), x[:, :1], _fp8(w), w[:, :1, :1].contiguous(), [4, 3]),
            "2 counts with sum 7 don't fit",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(random(8, 128, seed=0), random(2, 24, 128, seed=1))  # type: ignore[operator]
