"""Dense FP8 products: exact up to their sums by every backend, ragged shapes included, each row alone; misfits are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import standin_deep_gemm
import torch
from device_kernels import STEP, on_each_device, random, same_bits, twice
from torch import Tensor

from moesaic.kernels.fp8_gemm import fp8_gemm
from moesaic.kernels.fp8_rows import Fp8Rows, add_normed_rows, normed_rows, quantized_rows, swiglu_rows
from moesaic.kernels.gemm import BlockWeight, linear, stacked
from moesaic.kernels.grouped_backends import DENSE_NAMES, Name, dense_unfit_reason
from moesaic.kernels.quant import (
    BLOCK,
    dequantize_blocks_reference,
    dequantize_per_token_reference,
    quantize_blocks_reference,
)
from moesaic.kernels.triton.grouped_gemm import dense_tiling

BF16 = torch.bfloat16


def _weight(width: int, depth: int, seed: int = 1, device: str = "cpu", backends: tuple[Name, ...] = ()) -> BlockWeight:
    values, scales = quantize_blocks_reference(random(width, depth, seed=seed))
    return BlockWeight(values=values.to(device), scales=scales.to(device), backends=backends)


def _rows(num_rows: int, depth: int, device: str = "cpu", dtype: torch.dtype = BF16) -> Fp8Rows:
    """Blocks of unlike size, so that a wrong scale would show."""
    spread = torch.arange(1, -(-depth // BLOCK) + 1).repeat_interleave(BLOCK)[:depth] ** 3
    return quantized_rows((random(num_rows, depth, seed=2) * spread).to(dtype).to(device))


def _exact(rows: Fp8Rows, weight: BlockWeight) -> Tensor:
    x = dequantize_per_token_reference(rows.values, rows.scales, torch.float64)
    return x @ dequantize_blocks_reference(weight.values, weight.scales, torch.float64).t()


def _assert_near(got: Tensor, exact: Tensor) -> None:
    """Rounded to got's dtype once; sums of fp32 in any order lose a little of the largest."""
    size = exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(got.double().cpu(), exact.cpu(), rtol=STEP[got.dtype], atol=size * 2**-12)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("num_rows", "width", "depth"), [(0, 72, 128), (1, 200, 272), (70, 72, 144), (5, 24, 16)])
def test_triton_and_torch_are_exact_up_to_the_sums(device: str, num_rows: int, width: int, depth: int, dtype: torch.dtype) -> None:
    rows, weight = _rows(num_rows, depth, device, dtype), _weight(width, depth, device=device)
    exact = _exact(rows, weight)
    by_triton = twice(lambda: linear(rows, replace(weight, backends=("triton",))))
    for got in (by_triton, linear(rows, replace(weight, backends=("torch",)))):
        assert got.shape == (num_rows, width) and got.dtype is dtype
        _assert_near(got, exact)


@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_deep_gemm_gets_the_layouts_it_wants(num_rows: int) -> None:
    rows, weight = _rows(num_rows, 256), _weight(192, 256, backends=("deep_gemm", "triton"))
    with standin_deep_gemm.installed():
        _assert_near(linear(rows, weight), _exact(rows, weight))


@on_each_device
def test_a_row_does_not_depend_on_the_other_rows(device: str) -> None:
    weight = _weight(72, 144, device=device, backends=("triton",))
    x = random(70, 144, seed=3, device=device)
    whole = linear(x, weight)
    assert same_bits(whole[60:], linear(x[60:], weight))


@pytest.mark.parametrize(("first", "parts"), [(256, 1), (72, 2)])
def test_stacked_weights_give_their_products_side_by_side(first: int, parts: int) -> None:
    weights = (_weight(first, 144), _weight(40, 144, seed=5))
    both = stacked(*weights)
    assert (len(both) if isinstance(both, tuple) else 1) == parts
    x = random(2, 3, 144, seed=4)
    assert torch.equal(linear(x, both), torch.cat([linear(x, each) for each in weights], dim=2))


def test_rows_are_quantised_by_the_operation_that_makes_them() -> None:
    """Near what the operation gives in float64: half a step of e4m3, 1/16, at most."""
    x, residual, gamma = random(5, 200, seed=1), random(5, 200, seed=2), 1 + random(200, seed=3) / 8
    total = (x + residual).double()

    def norm(x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x.double(), (200,), gamma.double(), 1e-6)

    gate, up = x.double().chunk(2, dim=1)
    with_sum, summed = add_normed_rows(x, residual, gamma, 1e-6)
    assert torch.equal(summed, x + residual)
    for rows, exact in (
        (quantized_rows(x), x.double()),
        (normed_rows(x, gamma, 1e-6), norm(x)),
        (with_sum, norm(total)),
        (swiglu_rows(x), gate * gate.sigmoid() * up),
    ):
        values = dequantize_per_token_reference(rows.values, rows.scales, torch.float64)
        assert rows.scales.stride(0) == 1 and rows.dtype is torch.float32
        torch.testing.assert_close(values, exact, rtol=2**-4, atol=float(exact.abs().max()) * 2**-9)


def test_a_tile_for_every_multiprocessor_where_rows_are_few() -> None:
    assert dense_tiling(64, 2112, 132).columns == 32
    assert dense_tiling(64, 24576, 132).columns == 128
    assert dense_tiling(4096, 2112, 132).columns == 128


def test_each_backend_says_which_shapes_it_does_not_take() -> None:
    assert all(dense_unfit_reason(name, 2112, 7168) is None for name in DENSE_NAMES)
    assert dense_unfit_reason("deep_gemm", 32, 128) == "wants [N, K] of multiples of 64 and 128, and a weight is [32, 128]"
    assert dense_unfit_reason("triton", 64, 24) == "wants K to be a multiple of 16, and a weight is [64, 24]"
    assert dense_unfit_reason("cutlass", 128, 128) == "has no dense product"
    assert dense_unfit_reason("torch", 7, 3) is None


ROWS, WEIGHT = _rows(4, 144), _weight(24, 144)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fp8_gemm(ROWS.values[:, :128], ROWS.scales, WEIGHT.values, WEIGHT.scales), "x has strides"),
        (
            lambda: fp8_gemm(ROWS.values, ROWS.scales[:, :1], WEIGHT.values, WEIGHT.scales),
            r"x_scales is .*\[4, 1\]",
        ),
        (
            lambda: fp8_gemm(ROWS.values, ROWS.scales, WEIGHT.values.float(), WEIGHT.scales),
            "weight is float32",
        ),
        (lambda: fp8_gemm(ROWS.values, ROWS.scales, WEIGHT.values, WEIGHT.scales.t()), r"weight_scales has shape \[2, 1\]"),
        (lambda: linear(ROWS, _weight(24, 144, backends=("deep_gemm",))), "multiples of 64 and 128, and a weight is"),
        (lambda: linear(random(4, 128, seed=1), _weight(64, 128, backends=("deep_gemm",))), "out_dtype is torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: Callable[[], Tensor], message: str) -> None:
    with standin_deep_gemm.installed(), pytest.raises(ValueError, match=message):
        call()
