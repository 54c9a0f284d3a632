"""The paged latent KV pool: one row of kv_lora_rank + rope elements per token and layer.

A token's slot is page * page_size + offset. MLA's latent is shared by all heads, so every attention-TP rank of a DP group holds
the same rows.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


class LatentKVPool:
    """KV memory of one rank for all layers, [num_layers, (num_pages + 1) * page_size, latent_dim].

    One page more than there are to give away: `scratch_page`, where the blank rows of padded steps write. Nobody reads it for a
    token.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        latent_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_layers = num_layers
        self.num_pages = num_pages
        self.page_size = page_size
        self._rows = _zeros((num_layers, (num_pages + 1) * page_size, latent_dim), dtype, device)

    @property
    def scratch_page(self) -> int:
        return self.num_pages

    @property
    def scratch_slot(self) -> int:
        return self.num_pages * self.page_size

    @staticmethod
    def bytes_per_token(num_layers: int, latent_dim: int, dtype: torch.dtype) -> int:
        return num_layers * latent_dim * dtype.itemsize

    def rows(self, layer: int) -> Tensor:
        """View [(num_pages + 1) * page_size, latent_dim] of a layer."""
        return self._rows[layer]

    def pages(self, layer: int) -> Tensor:
        """View [num_pages, page_size * latent_dim] of a layer; a page is one contiguous run of bytes."""
        return self._rows[layer].view(self.num_pages + 1, -1)[: self.num_pages]

    def clear(self, pages: Tensor) -> None:
        """Zero the listed pages, int64 [P], in all layers."""
        rows = self._rows.view(torch.uint8)  # torch fills no FP8
        rows.view(rows.shape[0], self.num_pages + 1, -1).index_fill_(1, pages, 0)

    def gather(self, layer: int, page_table: Tensor) -> Tensor:
        """Rows of the listed pages: page_table int64 [B, P] -> [B, P * page_size, latent_dim]."""
        pages = self.pages(layer).index_select(0, page_table.flatten())
        return pages.view(page_table.shape[0], -1, self._rows.shape[-1])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On CPU they are anonymous pages, which cost memory and time only once touched: most of a pool never is."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
