"""Copies of KV pages in host memory: there and back, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesaic.attention.host_pool import HostKVPool
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.page_allocator import OutOfPages, PageArray


def _pages(*numbers: int) -> PageArray:
    return np.array(numbers, dtype=np.int32)


@pytest.fixture(params=[torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def device_pool(request: pytest.FixtureRequest) -> LatentKVPool:
    """Random bits, not-a-numbers among them."""
    pool = LatentKVPool(num_layers=3, num_pages=12, page_size=4, latent_dim=5, dtype=request.param, device=torch.device("cpu"))
    for layer in range(3):
        rows = pool.rows(layer)
        rows.view(torch.uint8).random_(256)
    return pool


def _bits(pool: LatentKVPool, pages: PageArray) -> torch.Tensor:
    return torch.stack([pool.pages(layer).view(torch.uint8)[pages.tolist()] for layer in range(pool.num_layers)])


def test_pages_come_back_bit_by_bit_into_other_pages(device_pool: LatentKVPool) -> None:
    host = HostKVPool(device_pool, 6)
    first = host.store(_pages(1))
    wanted = _bits(device_pool, _pages(7, 3, 4, 11))
    kept = host.store(_pages(7, 3, 4, 11))
    host.free(first)
    scattered = host.store(_pages(2, 5))  # where `first` was, and behind `kept`
    others = _bits(device_pool, _pages(2, 5, 6))
    device_pool.clear(torch.tensor([2, 3, 4, 5, 7, 8, 9, 11]))

    host.load(kept, _pages(0, 9, 8, 1))
    host.load(scattered, _pages(5, 2))

    assert torch.equal(_bits(device_pool, _pages(0, 9, 8, 1)), wanted)
    assert torch.equal(_bits(device_pool, _pages(5, 2, 6)), others), "page 6 was not touched"


def test_it_takes_no_more_than_it_has_room_for(device_pool: LatentKVPool) -> None:
    host = HostKVPool(device_pool, 3)
    kept = host.store(_pages(1, 2))
    with pytest.raises(OutOfPages, match="wanted 2"):
        host.store(_pages(3, 4))
    host.free(kept)
    host.free(host.store(_pages(1, 2, 3)))

    assert host.num_free == 3
