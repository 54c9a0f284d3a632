"""The adapter to DeepGEMM gives the library what it wants, and its results are those of torch; on a stand-in, on CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import standin_deep_gemm
import torch
from device_kernels import random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels import deep_gemm
from moesaic.kernels.grouped_backends import BACKENDS, NAMES, TABLE, choose, rule_for, unfit_reason
from moesaic.kernels.grouped_gemm import (
    grouped_gemm_contiguous,
    grouped_gemm_fp8_contiguous,
    grouped_gemm_fp8_masked,
    grouped_gemm_masked,
)
from moesaic.kernels.quant import quantize_blocks_reference, quantize_per_token_reference

BF16 = torch.bfloat16
COUNTS = st.lists(st.sampled_from([0, 128, 256]), min_size=1, max_size=3)


def _fp8_weight(experts: int, width: int, depth: int) -> tuple[Tensor, Tensor]:
    pairs = [quantize_blocks_reference(random(width, depth, seed=expert)) for expert in range(experts)]
    return torch.stack([values for values, _ in pairs]), torch.stack([scales for _, scales in pairs])


@settings(max_examples=10, deadline=None)
@given(counts=COUNTS, mn_major=st.booleans(), seed=st.integers(0, 2**31))
def test_contiguous_products_are_those_of_torch(counts: list[int], mn_major: bool, seed: int) -> None:
    x, weight = random(sum(counts), 192, seed=seed, dtype=BF16), random(len(counts), 136, 192, seed=seed + 1, dtype=BF16)
    quantized, scales = quantize_per_token_reference(x, mn_major_scales=mn_major)
    eight = (quantized.contiguous(), scales, *_fp8_weight(len(counts), 136, 192), counts)
    with standin_deep_gemm.installed():
        for product, arguments in ((grouped_gemm_contiguous, (x, weight, counts)), (grouped_gemm_fp8_contiguous, eight)):
            got, wanted = (product(*arguments, backend=name) for name in ("deep_gemm", "torch"))
            assert got.dtype is BF16
            torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    spare=st.integers(0, 3),
    expected=st.sampled_from([None, 0, 2, 99]),
    mn_major=st.booleans(),
)
def test_masked_products_are_those_of_torch_in_their_valid_rows(
    counts: list[int], spare: int, expected: int | None, mn_major: bool
) -> None:
    room, on_device = max(counts) + spare, torch.tensor(counts)
    x, weight = random(len(counts), room, 128, seed=3, dtype=BF16), random(len(counts), 72, 128, seed=4, dtype=BF16)
    quantized, scales = quantize_per_token_reference(x.view(-1, 128))
    by_expert = scales.view(len(counts), room, 1)
    if mn_major:
        by_expert = deep_gemm.empty_scales(x, mn_major=True).copy_(by_expert)
    eight = (quantized.view(x.shape), by_expert, *_fp8_weight(len(counts), 72, 128), on_device)
    with standin_deep_gemm.installed():
        for product, arguments in ((grouped_gemm_masked, (x, weight, on_device)), (grouped_gemm_fp8_masked, eight)):
            got = product(*arguments, expected_rows=expected, backend="deep_gemm")
            wanted = product(*arguments, backend="torch")
            assert got.shape == wanted.shape
            for expert, count in enumerate(counts):
                torch.testing.assert_close(got[expert, :count], wanted[expert, :count], rtol=2**-7, atol=1e-3)


X, W = random(128, 128, seed=0, dtype=BF16), random(1, 64, 128, seed=1, dtype=BF16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grouped_gemm_contiguous(X[:100], W, [100], backend="deep_gemm"), r"counts are \[100\], wanted multiples of 128"),
        (lambda: grouped_gemm_contiguous(X.float(), W.float(), [128], backend="deep_gemm"), "x is float32, wanted bfloat16"),
        (lambda: grouped_gemm_contiguous(X, W[:, :60].contiguous(), [128], backend="deep_gemm"), "N is 60, wanted a multiple of 8"),
        (
            lambda: grouped_gemm_contiguous(X[:, :96].contiguous(), W[..., :96].contiguous(), [128], backend="deep_gemm"),
            "K is 96, wanted a multiple of 64",
        ),
        (
            lambda: grouped_gemm_contiguous(X, W.transpose(1, 2).contiguous().transpose(1, 2), [128], backend="deep_gemm"),
            "weight has strides .* wanted a contiguous tensor",
        ),
        (lambda: grouped_gemm_masked(X[None], W, X[0, :1], backend="deep_gemm"), "counts is bfloat16, wanted int64 or int32"),
        (
            lambda: deep_gemm.grouped_gemm_fp8_contiguous(X, X, W, W, [128], out_dtype=torch.float32),
            "out_dtype is torch.float32, wanted torch.bfloat16",
        ),
    ],
)
def test_what_the_library_does_not_take_is_refused_by_name(call: Callable[[], Tensor], message: str) -> None:
    with standin_deep_gemm.installed(), pytest.raises(ValueError, match=message):
        call()


def test_a_library_that_is_missing_or_another_version_is_refused_with_the_remedy() -> None:
    deep_gemm._library.cache_clear()
    reason = deep_gemm.missing_reason()
    assert reason is not None and "can't be imported: ModuleNotFoundError" in reason and "pip install sgl-deep-gemm" in reason
    with standin_deep_gemm.installed():
        assert deep_gemm.missing_reason() is None
        assert unfit_reason("deep_gemm", (9, 0)) is None
        assert unfit_reason("deep_gemm", (10, 0)) == "made for Hopper (sm_90), and the device is sm_100"
    with standin_deep_gemm.installed(m_grouped_bf16_gemm_nt_masked=None):
        assert "deep_gemm 2.6.1 has no m_grouped_bf16_gemm_nt_masked" in str(deep_gemm.missing_reason())
    with standin_deep_gemm.installed(get_mk_alignment_for_contiguous_layout=lambda: 224):
        assert "aligns an expert's rows to 224, wanted 128" in str(deep_gemm.missing_reason())


def test_the_table_knows_every_product_and_takes_the_best_of_what_there_is() -> None:
    for kind in ("fp8", "bfloat16", "float32"):
        able = [name for name in NAMES if kind in BACKENDS[name].kinds]
        for layout in ("contiguous", "masked"):
            for rows in (0, 64, 65, 10**6):
                rule = rule_for(kind, layout, rows)
                assert set(rule.order) | {"torch"} == set(able)
                assert choose(kind, layout, rows, able) == rule.order[0]
                assert choose(kind, layout, rows, ["torch", rule.order[-1]]) == rule.order[-1]
    assert choose("fp8", "masked", 1, ["torch"]) == "torch"
    assert all(rule.source for rule in TABLE)
