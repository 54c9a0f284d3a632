"""KV pages in host memory: copies of pages of a device's pool, there and back, bit by bit. Knows no sequences.

Whoever copies sees to it that nothing else writes to the device's pages meanwhile. For a GPU the memory is page-locked, as much as
was asked for and no more (torch's own pinned memory comes in powers of two); that path has not been run on hardware.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.page_allocator import PageAllocator, PageArray
from moesaic.kernels.gpu import upload


class HostKVPool:
    """`num_pages` pages like those of `device_pool`, which it copies from and to."""

    def __init__(self, device_pool: LatentKVPool, num_pages: int) -> None:
        """Raises ValueError unless num_pages is at least 1."""
        rows = device_pool.rows(0)
        self._allocator = PageAllocator(num_pages)
        self._num_layers = device_pool.num_layers
        self._device_pool = device_pool
        self._device = rows.device
        self._pool = LatentKVPool(
            num_layers=self._num_layers,
            num_pages=num_pages,
            page_size=device_pool.page_size,
            latent_dim=rows.shape[1],
            dtype=rows.dtype,
            device=torch.device("cpu"),
        )
        if self.is_cuda:
            self._lock_pages()

    @property
    def num_pages(self) -> int:
        return self._allocator.num_pages

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self._device.type == "cuda"

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    def store(self, pages: PageArray) -> PageArray:
        """Copy these pages of the device, int32 [P], here; returns the host pages that hold them, int32 [P], the caller's until it
        frees them. The device's pages may be reused at once. Raises OutOfPages, having copied nothing.
        """
        host_pages = self._allocator.allocate(len(pages))
        index = self._on_device(pages)
        for layer in range(self._num_layers):
            found = _words(self._device_pool, layer).index_select(0, index)
            for here, part in _runs(host_pages):
                _words(self._pool, layer)[here].copy_(found[part], non_blocking=True)
        if self.is_cuda:
            torch.cuda.current_stream(self._device).synchronize()
        return host_pages

    def load(self, host_pages: PageArray, pages: PageArray) -> None:
        """Copy host pages, int32 [P], into these pages of the device, int32 [P]. On a GPU in the order of the current stream: a
        later `store` from the same stream may reuse the host pages.
        """
        index = self._on_device(pages)
        for layer in range(self._num_layers):
            for here, part in _runs(host_pages):
                found = _words(self._pool, layer)[here].to(self._device, non_blocking=True)
                _words(self._device_pool, layer).index_copy_(0, index[part], found)

    def free(self, host_pages: PageArray) -> None:
        """Give host pages back. AssertionError for pages that nobody holds."""
        self._allocator.free(host_pages)

    def _on_device(self, pages: PageArray) -> Tensor:
        return upload(torch.from_numpy(pages.astype(np.int64)), self._device)

    def _lock_pages(self) -> None:
        """So that copies run at the bus's speed, beside computation."""
        first = self._pool.pages(0)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(first.data_ptr(), first.untyped_storage().nbytes(), 0))
        weakref.finalize(self, runtime.cudaHostUnregister, first.data_ptr())


def _words(pool: LatentKVPool, layer: int) -> Tensor:
    """A layer's pages as integers, wide ones where they fit: torch indexes no FP8, and on a CPU it copies element by element."""
    pages = pool.pages(layer).view(torch.uint8)
    return pages.view(torch.int64) if pages.shape[1] % 8 == 0 else pages


def _runs(pages: PageArray) -> Iterator[tuple[slice, slice]]:
    """Where pages follow each other: these pages, and their places in the array."""
    cuts = [0, *(np.flatnonzero(np.diff(pages) != 1) + 1).tolist(), len(pages)]
    for start, end in itertools.pairwise(cuts):
        if end > start:
            yield slice(int(pages[start]), int(pages[start]) + end - start), slice(start, end)
