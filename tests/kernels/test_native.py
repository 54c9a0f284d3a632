"""The C kernels equal their torch references at sizes with and without ragged ends, and no row's result depends on its batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.activation import swiglu, swiglu_reference
from moesaic.kernels.grouped_gemm import grouped_gemm_contiguous
from moesaic.kernels.head_product import head_product, head_product_reference
from moesaic.kernels.latent_write import write_latent, write_latent_reference
from moesaic.kernels.mla_decode import mla_decode, mla_decode_reference
from moesaic.kernels.mla_prefill import mla_prefill, padded_rows
from moesaic.kernels.native.build import CACHE_VARIABLE, SWITCH_VARIABLE
from moesaic.kernels.native.library import status
from moesaic.kernels.norm import add_rms_norm, rms_norm, rms_norm_reference
from moesaic.kernels.permute import contiguous_map, from_rows, masked_map, to_rows, weighted_rows, weighted_sum
from moesaic.kernels.rope import apply_rope, apply_rope_reference, rope_table
from moesaic.kernels.rope_config import RopeConfig
from moesaic.kernels.topk import grouped_topk, grouped_topk_reference

pytestmark = pytest.mark.skipif(status().library is None, reason=f"no CPU kernels here: {status().reason}")

TABLE = rope_table(RopeConfig(dim=16, theta=10000.0), 100)
WIDTHS = st.sampled_from([1, 5, 16, 33, 64, 128, 200])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 9), width=WIDTHS, extra=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_norms_equal_their_reference_on_whole_tensors_and_on_columns_of_wider_ones(
    rows: int, width: int, extra: int, seed: int
) -> None:
    x = _random(rows, width + extra, seed=seed)[:, :width]
    weight = _random(width, seed=seed + 1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    residual = _random(rows, width, seed=seed + 2)
    normed, total = add_rms_norm(x.contiguous(), residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, rms_norm_reference(total, weight, 1e-6))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 9), width=WIDTHS, magnitude=st.sampled_from([1e-6, 1.0, 30.0, 1e4]), seed=st.integers(0, 2**31))
def test_swiglu_equals_its_reference_where_the_exponential_is_tiny_or_huge(
    rows: int, width: int, magnitude: float, seed: int
) -> None:
    x = _random(rows, 2 * width, seed=seed) * magnitude
    torch.testing.assert_close(swiglu(x), swiglu_reference(x), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 40), groups=st.sampled_from([1, 4, 8]), size=st.sampled_from([2, 8, 32]), seed=st.integers(0, 2**31))
def test_expert_choice_equals_its_reference(tokens: int, groups: int, size: int, seed: int) -> None:
    logits, bias = _random(tokens, groups * size, seed=seed), _random(groups * size, seed=seed + 1)
    options = {"num_groups": groups, "topk_groups": max(1, groups // 2), "topk": 2, "normalize": bool(seed % 2)}
    ids, weights = grouped_topk(logits, bias, scaling_factor=2.5, **options)  # type: ignore[arg-type]
    expected_ids, expected = grouped_topk_reference(logits, bias, scaling_factor=2.5, **options)  # type: ignore[arg-type]
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 20), heads=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_rotation_of_a_part_of_every_head_leaves_the_rest_alone(tokens: int, heads: int, seed: int) -> None:
    whole = _random(tokens, heads, 24, seed=seed)
    kept = whole.clone()
    positions = torch.randint(0, 100, (tokens,), generator=torch.Generator().manual_seed(seed))
    rotated = apply_rope(whole[..., 8:], TABLE, positions)
    torch.testing.assert_close(rotated, apply_rope_reference(kept[..., 8:], TABLE, positions))
    assert torch.equal(whole[..., :8], kept[..., :8])


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 20), width=st.sampled_from([6, 16, 70]), seed=st.integers(0, 2**31))
def test_the_kv_write_equals_its_reference_and_touches_no_other_row(tokens: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(tokens, 4 + width + 16, generator=generator)[:, 4:]
    norm = torch.randn(width, generator=generator)
    positions = torch.randint(0, 100, (tokens,), generator=generator)
    slots = torch.randperm(30, generator=generator)[:tokens]
    pools = [torch.full((30, width + 16), 7.0) for _ in range(2)]
    for write, pool in zip((write_latent, write_latent_reference), pools, strict=True):
        write(projected, norm, 1e-6, table=TABLE, positions=positions, slots=slots, pool_rows=pool)
    torch.testing.assert_close(pools[0], pools[1])


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 30), topk=st.integers(1, 6), experts=st.integers(1, 9), masked=st.booleans(), seed=st.integers(0, 2**31)
)
def test_weighted_rows_equal_gathering_and_summing(tokens: int, topk: int, experts: int, masked: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, topk), generator=generator)
    row_map = masked_map(ids, experts, tokens * topk) if masked else contiguous_map(ids, experts, 1)[0]
    rows = to_rows(torch.randn(tokens, 33, generator=generator), row_map)
    rows = rows * torch.rand(rows.shape, generator=generator)
    weights = torch.rand(tokens, topk, generator=generator)
    torch.testing.assert_close(weighted_rows(rows, row_map, weights), weighted_sum(from_rows(rows, row_map), weights))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_grouped_product_is_bitwise_the_same_in_every_batch(threads: int) -> None:
    counts = [1, 0, 13, 6, 2, 40]
    weight = _random(6, 96, 300).transpose(1, 2)
    x = _random(sum(counts), 96, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = grouped_gemm_contiguous(x, weight, counts)
        row = 0
        for expert, count in enumerate(counts):
            for _ in range(count):
                alone = grouped_gemm_contiguous(x[row : row + 1], weight, [int(e == expert) for e in range(6)])
                assert torch.equal(alone[0], together[row])
                row += 1
    finally:
        torch.set_num_threads(before)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 9), heads=st.integers(1, 4), depth=WIDTHS, width=WIDTHS, tail=st.sampled_from([0, 4]))
def test_head_products_equal_their_reference_whatever_the_strides(rows: int, heads: int, depth: int, width: int, tail: int) -> None:
    x = _random(rows, heads, depth + tail + 2)[:, :, : depth + tail]
    weight = _random(depth, heads, width, seed=1).transpose(0, 1)
    expected = head_product_reference(x.double(), weight.double(), tail=tail).float()
    torch.testing.assert_close(head_product(x, weight, tail=tail), expected, rtol=1e-4, atol=1e-4)


def test_a_chunk_is_attended_to_bitwise_the_same_in_every_batch_and_cut() -> None:
    heads, length = 3, 90
    key = padded_rows(torch.empty(0), heads * 16, length).copy_(_random(heads * 16, length)).unflatten(0, (heads, 16))
    key_rope = padded_rows(torch.empty(0), 8, length).copy_(_random(8, length, seed=1))
    query, value = _random(length, heads, 24, seed=2), _random(length, heads, 32, seed=3)
    whole = mla_prefill(query, key, key_rope, value, torch.tensor([[0, 40, 0, 0], [40, 50, 40, 0]]), scale=0.2)
    for start, stop in ((40, 47), (47, 48), (48, 90)):
        chunk = torch.tensor([[0, stop - start, 40, start - 40]])
        alone = mla_prefill(query[start:stop], key, key_rope, value, chunk, scale=0.2)
        assert torch.equal(alone, whole[start:stop])


def test_a_query_decodes_to_bitwise_the_same_in_every_batch() -> None:
    heads, width, page_size = 6, 80, 4
    lengths = torch.tensor([1, 50, 7, 64, 33])
    table = torch.randperm(5 * 16, generator=torch.Generator().manual_seed(0)).view(5, 16)
    pool, query = _random(5 * 64, width), _random(5, heads, width, seed=1)
    options = {"page_size": page_size, "value_dim": 70, "scale": 0.2}
    together = mla_decode(query, pool, table, lengths, **options)  # type: ignore[arg-type]
    reference = mla_decode_reference(query, pool, table, lengths, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(together, reference, rtol=1e-4, atol=1e-5)
    for row in range(5):
        part = slice(row, row + 1)
        pages = -(-int(lengths[row]) // page_size)
        alone = mla_decode(query[part], pool, table[part, :pages], lengths[part], **options)  # type: ignore[arg-type]
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"CC": "/bin/false"}, "/bin/false refused the CPU kernels"),
        ({"PATH": "/nonexistent", "CC": ""}, "no C compiler"),
        ({SWITCH_VARIABLE: "torch"}, f"{SWITCH_VARIABLE}=torch"),
    ],
)
def test_without_kernels_the_reason_is_told_and_torch_computes(changes: dict[str, str], reason: str, tmp_path: Path) -> None:
    program = (
        "import torch\n"
        "from moesaic.kernels.native.library import status\n"
        "from moesaic.kernels.norm import rms_norm\n"
        "assert rms_norm(torch.ones(2, 4), torch.ones(4), 0.0).sum() == 8\n"
        "print(status().library, status().reason)"
    )
    environment = {**os.environ, CACHE_VARIABLE: str(tmp_path), **changes}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(f"None {reason}")
    assert not list(tmp_path.iterdir())
