"""Rope, the KV write and MLA decode in Triton are what float64 says, in bf16 and FP8 pools, and never depend on the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_kernels import FLOATS, STEP, assert_close, on_each_device, random, same_bits, twice
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.latent_write import write_latent_reference
from moesaic.kernels.mla_decode import mla_decode_reference
from moesaic.kernels.quant import FP8
from moesaic.kernels.rope import apply_rope_reference, rope_table
from moesaic.kernels.rope_config import RopeConfig
from moesaic.kernels.triton import mla_decode, rope

SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from(FLOATS)


def _rotation(dim: int, tokens: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    positions = torch.randint(0, 100, (tokens,), generator=torch.Generator().manual_seed(seed))
    return rope_table(RopeConfig(dim=dim, theta=10000.0), 100).to(device), positions.to(device)


@on_each_device
@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(0, 5), heads=st.sampled_from([1, 3, 20]), dim=st.sampled_from([2, 12, 64]), dtype=DTYPES, seed=SEEDS)
def test_rope_rotates_in_place_and_nothing_beside(
    *, device: str, tokens: int, heads: int, dim: int, dtype: torch.dtype, seed: int
) -> None:
    table, positions = _rotation(dim, tokens, seed, device)
    wide = random(tokens, heads, dim + 3, seed=seed, dtype=dtype, device=device)
    before = wide.clone()
    x = wide[..., :dim]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (dim // 2, 2)).clone(memory_format=torch.contiguous_format))
    exact = torch.view_as_real(pairs * table.to(torch.complex128)[positions].unsqueeze(1)).flatten(-2)
    assert rope.apply_rope(x, table, positions) is x
    assert_close(x, exact, absolute=4 * STEP[dtype])
    assert_close(apply_rope_reference(before[..., :dim], table, positions), exact, absolute=4 * STEP[dtype])
    assert torch.equal(wide[..., dim:], before[..., dim:])


@on_each_device
@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(0, 5), width=st.sampled_from([5, 32, 128]), dtype=DTYPES, to_fp8=st.booleans(), seed=SEEDS)
def test_the_kv_write_normalises_rotates_and_touches_only_its_rows(
    *, device: str, tokens: int, width: int, dtype: torch.dtype, to_fp8: bool, seed: int
) -> None:
    dim, kv_scale = 8, 0.02 if to_fp8 else 1.0
    table, positions = _rotation(dim, tokens, seed, device)
    projected = random(tokens, width + dim + 1, seed=seed, dtype=dtype, device=device)[:, : width + dim]
    norm = random(width, seed=seed + 1, dtype=dtype, device=device)
    slots = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[:tokens].to(device)
    kind = FP8 if to_fp8 else dtype
    blank = torch.full((9, width + dim), -7.0, device=device)
    exact = blank.double()
    options: dict[str, Any] = {"table": table, "positions": positions, "slots": slots}
    write_latent_reference(projected.double(), norm.double(), 1e-6, pool_rows=exact, **options)
    if to_fp8:
        exact.clamp_(-448 * kv_scale, 448 * kv_scale)  # what FP8 can hold
    for write in (rope.write_latent, write_latent_reference):
        pool = blank.to(kind)
        write(projected, norm, 1e-6, pool_rows=pool, kv_scale=kv_scale, **options)
        others = torch.ones(9, dtype=torch.bool, device=device)
        others[slots] = False
        assert same_bits(pool[others], blank.to(kind)[others])
        written = pool[slots].double() * kv_scale
        relative = 2**-4 if to_fp8 else 2 * STEP[dtype]
        torch.testing.assert_close(written, exact[slots], rtol=relative * 1.001, atol=max(kv_scale * 2**-10, 4 * STEP[dtype]))


def _decode(device: str, lens: list[int], heads: int, dtype: torch.dtype, seed: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a decode: pages in random order, one page more than needed, full of NaN where nothing may be read."""
    page_size, width = changes.pop("page_size", 4), changes.pop("width", 24)
    most = -(-max(lens, default=1) // page_size) + 1
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(len(lens) * most + 1, generator=generator)[: len(lens) * most].view(len(lens), most)
    pool = random((len(lens) * most + 1) * page_size, width, seed=seed + 1)
    used = torch.zeros(pool.shape[0], dtype=torch.bool)
    for row, length in enumerate(lens):
        tokens = torch.arange(length)
        used[pages[row, tokens // page_size] * page_size + tokens % page_size] = True
    if changes.pop("poison", True):
        pool[~used] = float("nan")
    query = random(len(lens), heads, width, seed=seed + 2, dtype=dtype, device=device)
    return {
        "query": query,
        "pool_rows": pool.to(dtype).to(device),
        "page_table": pages.to(device),
        "seq_lens": torch.tensor(lens, dtype=torch.int64, device=device),
        "page_size": page_size,
        "value_dim": 16,
        "scale": 0.2,
    } | changes


def _exact(arguments: dict[str, Any], kv_scale: float = 1.0) -> Tensor:
    """Row by row in float64: what lies past a context is never looked at."""
    outputs = []
    size, value_dim = arguments["page_size"], arguments["value_dim"]
    for row, length in enumerate(arguments["seq_lens"].tolist()):
        tokens = torch.arange(length, device=arguments["query"].device)
        latent = arguments["pool_rows"][arguments["page_table"][row, tokens // size] * size + tokens % size].double() * kv_scale
        scores = arguments["query"][row].double() @ latent.t() * arguments["scale"]
        outputs.append(scores.softmax(-1) @ latent[:, :value_dim])
    return torch.stack(outputs) if outputs else arguments["query"][..., :value_dim].double()


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    lens=st.lists(st.sampled_from([1, 3, 16, 17, 70]), max_size=3),
    heads=st.sampled_from([1, 5, 20]),
    page_size=st.sampled_from([1, 4, 64]),
    split_tokens=st.sampled_from([16, 64, 4096]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_decode_reads_its_own_context_and_no_more(
    *, device: str, lens: list[int], heads: int, page_size: int, split_tokens: int, dtype: torch.dtype, seed: int
) -> None:
    arguments = _decode(device, lens, heads, dtype, seed, page_size=page_size)
    got = twice(lambda: mla_decode.mla_decode(**arguments, split_tokens=split_tokens))
    exact = _exact(arguments)
    torch.testing.assert_close(got.double(), exact, rtol=4 * STEP[dtype], atol=8 * STEP[dtype])
    clean = arguments | {"pool_rows": arguments["pool_rows"].nan_to_num()}
    if lens:
        torch.testing.assert_close(mla_decode_reference(**clean).double(), exact, rtol=4 * STEP[dtype], atol=8 * STEP[dtype])


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_from_an_fp8_pool_equals_its_dequantised_values(device: str, dtype: torch.dtype) -> None:
    arguments = _decode(device, [70, 5, 33], 20, dtype, 4, poison=False)
    arguments["pool_rows"] = (arguments["pool_rows"].float() / 0.02).clamp(-448, 448).to(FP8)
    got = twice(lambda: mla_decode.mla_decode(**arguments, split_tokens=32, kv_scale=0.02))
    exact = _exact(arguments, 0.02)
    torch.testing.assert_close(got.double(), exact, rtol=4 * STEP[dtype], atol=8 * STEP[dtype])
    reference = mla_decode_reference(**arguments, kv_scale=0.02)
    torch.testing.assert_close(reference.double(), exact, rtol=8 * STEP[dtype], atol=8 * STEP[dtype])


@on_each_device
def test_a_bf16_query_of_any_size_meets_an_fp8_pool_exactly(device: str) -> None:
    """It becomes fp16 over a power of two, which nothing is lost by."""
    arguments = _decode(device, [70, 5], 3, torch.bfloat16, 6, poison=False)
    arguments["pool_rows"] = arguments["pool_rows"].float().to(FP8)
    large = arguments | {"query": arguments["query"] * 2**30, "scale": arguments["scale"] / 2**30}
    small = arguments | {"query": arguments["query"] / 2**30, "scale": arguments["scale"] * 2**30}
    expected, *got = (mla_decode.mla_decode(**each, split_tokens=32) for each in (arguments, large, small))
    assert all(same_bits(each, expected) for each in got)


@on_each_device
def test_deepseeks_own_sizes(device: str) -> None:
    arguments = _decode(device, [130], 70, torch.bfloat16, 1, page_size=64, width=576, value_dim=512)
    got = mla_decode.mla_decode(**arguments, split_tokens=64)
    torch.testing.assert_close(got.double(), _exact(arguments), rtol=0.02, atol=0.02)


@on_each_device
def test_a_sequence_does_not_depend_on_its_batch_or_the_width_of_the_table(device: str) -> None:
    arguments = _decode(device, [70, 5, 33, 64], 5, torch.bfloat16, 8)
    whole = mla_decode.mla_decode(**arguments, split_tokens=32)
    for row, length in enumerate([70, 5, 33, 64]):
        alone = {name: arguments[name][row : row + 1] for name in ("query", "page_table", "seq_lens")}
        alone["page_table"] = alone["page_table"][:, : -(-length // 4)].contiguous()
        assert same_bits(whole[row : row + 1], mla_decode.mla_decode(**(arguments | alone), split_tokens=32))


@on_each_device
def test_an_idle_row_is_zero(device: str) -> None:
    arguments = _decode(device, [5, 0], 3, torch.float32, 2)
    assert not twice(lambda: mla_decode.mla_decode(**arguments, split_tokens=32))[1].any()


def _decode_with(**changes: Any) -> object:
    return mla_decode.mla_decode(**(_decode("cpu", [3], 2, torch.float32, 0) | {"split_tokens": 8} | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _decode_with(query=torch.ones(1, 24)), r"query has shape \[1, 24\]"),
        (lambda: _decode_with(pool_rows=torch.ones(8, 24).half()), "pool_rows is float16, wanted float32 or float8_e4m3fn"),
        (lambda: _decode_with(seq_lens=torch.ones(2).long()), r"seq_lens has shape \[2\], wanted \[1\]"),
        (lambda: _decode_with(value_dim=24), "value_dim is 24, wanted 1 to 23"),
        (lambda: _decode_with(split_tokens=0), "split_tokens is 0, wanted 1 or more"),
        (lambda: _decode_with(kv_scale=0.5), "kv_scale is 0.5 for a pool in float32, wanted 1"),
        (lambda: _decode_with(kv_scale=0.0, pool_rows=torch.zeros(8, 24).to(FP8)), "kv_scale is 0.0, wanted a finite number"),
        (lambda: rope.apply_rope(torch.ones(1, 1, 3), torch.ones(2, 1).cfloat(), torch.zeros(1).long()), "3 dimensions to"),
        (lambda: rope.apply_rope(torch.ones(1, 1, 4), torch.ones(2, 2), torch.zeros(1).long()), "table is float32, wanted"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
