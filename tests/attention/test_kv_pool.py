"""The latent KV pool: exact bytes per token, slots that land in their page, layers that don't mix."""

from __future__ import annotations

import pytest
import torch

from moesaic.attention.kv_pool import LatentKVPool


def _pool(dtype: torch.dtype = torch.float32) -> LatentKVPool:
    return LatentKVPool(num_layers=2, num_pages=5, page_size=4, latent_dim=6, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("num_layers", "kv_lora_rank", "rope", "dtype", "expected"),
    [
        (61, 512, 64, torch.bfloat16, 70_272),
        (61, 512, 64, torch.float32, 140_544),
        (61, 512, 64, torch.float8_e4m3fn, 35_136),
        (3, 32, 16, torch.float32, 576),
    ],
)
def test_a_token_costs_its_latent_and_rotary_key_per_layer_and_nothing_more(
    num_layers: int, kv_lora_rank: int, rope: int, dtype: torch.dtype, expected: int
) -> None:
    assert LatentKVPool.bytes_per_token(num_layers, kv_lora_rank + rope, dtype) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pool_holds_exactly_its_tokens_bytes(dtype: torch.dtype) -> None:
    pool = _pool(dtype)
    held = sum(pool.pages(layer).nbytes for layer in range(2))
    scratch = held // pool.num_pages
    assert pool.pages(0).untyped_storage().nbytes() == held + scratch
    assert held == 5 * 4 * LatentKVPool.bytes_per_token(2, 6, dtype)


def test_rows_are_found_again_page_by_page_in_the_order_of_the_table() -> None:
    pool = _pool()
    rows = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    pages = torch.tensor([3, 1])
    positions = torch.arange(7)
    pool.rows(1)[pages[positions // 4] * 4 + positions % 4] = rows
    assert torch.equal(pool.gather(1, pages.unsqueeze(0))[0, :7], rows)
    both = pool.gather(1, torch.tensor([[1, 3], [3, 3]]))
    assert both.shape == (2, 8, 6)
    assert torch.equal(both[0, 4:], rows[:4])
    assert torch.equal(both[1, :4], both[1, 4:])


def test_the_rows_of_a_layer_are_its_own() -> None:
    pool = _pool()
    pool.rows(0)[torch.tensor([2, 9])] = torch.ones(2, 6)
    assert not pool.pages(1).any()
    assert pool.pages(0).view(20, 6).any(1).nonzero().flatten().tolist() == [2, 9]


def test_rows_are_stored_in_the_pools_dtype() -> None:
    pool = _pool(torch.bfloat16)
    pool.rows(0)[0] = torch.full((6,), 1 + 2**-12)
    assert torch.equal(pool.gather(0, torch.tensor([[0]]))[0, 0], torch.ones(6, dtype=torch.bfloat16))
