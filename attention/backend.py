"""The attention backend protocol: what MLA asks of an implementation, and ours, over the kernels."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.metadata import AttentionMetadata, DecodeBucket
from moesaic.kernels.mla_decode import mla_decode
from moesaic.kernels.mla_prefill import mla_prefill
from moesaic.kernels.prefill_libraries import FlashInferPrefill, Prefill, sdpa_prefill


class AttentionBackend(Protocol):
    """Attention over the KV pool; the rows of this step have been written before."""

    def decode(
        self,
        query: Tensor,
        pool: LatentKVPool,
        layer: int,
        metadata: AttentionMetadata,
        *,
        value_dim: int,
        scale: float,
    ) -> Tensor:
        """Absorbed query [num_decode, heads, latent_dim] -> latent output [num_decode, heads, value_dim]."""
        ...

    def latent_context(self, pool: LatentKVPool, layer: int, pages: Tensor) -> Tensor:
        """Latent rows of the pages int64 [P], one after the other: [P * page_size, latent_dim]."""
        ...

    def extend(self, query: Tensor, key: Tensor, key_rope: Tensor, value: Tensor, chunks: Tensor, *, scale: float) -> Tensor:
        """Causal attention of packed chunks, as `mla_prefill`: [T, heads, D] -> [T, heads, V]."""
        ...


class KernelBackend:
    """Gathers pages and leaves the arithmetic to the kernels; runs on any device. `prefill`: what attends for chunks."""

    def __init__(self, prefill: Prefill = mla_prefill) -> None:
        self._prefill = prefill

    def decode(
        self,
        query: Tensor,
        pool: LatentKVPool,
        layer: int,
        metadata: AttentionMetadata,
        *,
        value_dim: int,
        scale: float,
    ) -> Tensor:
        buckets = metadata.buckets
        if len(buckets) == 1 and buckets[0].rows is None:
            return self._decode(query, pool.rows(layer), buckets[0], value_dim, scale)
        out = query.new_empty(*query.shape[:2], value_dim)
        for bucket in buckets:
            assert bucket.rows is not None, "several buckets name their rows"
            out[bucket.rows] = self._decode(query[bucket.rows], pool.rows(layer), bucket, value_dim, scale)
        return out

    @staticmethod
    def _decode(query: Tensor, pool_rows: Tensor, bucket: DecodeBucket, value_dim: int, scale: float) -> Tensor:
        return mla_decode(
            query,
            pool_rows,
            bucket.page_table,
            bucket.seq_lens,
            page_size=bucket.page_size,
            value_dim=value_dim,
            scale=scale,
        )

    def latent_context(self, pool: LatentKVPool, layer: int, pages: Tensor) -> Tensor:
        return pool.gather(layer, pages.unsqueeze(0))[0]

    def extend(self, query: Tensor, key: Tensor, key_rope: Tensor, value: Tensor, chunks: Tensor, *, scale: float) -> Tensor:
        return self._prefill(query, key, key_rope, value, chunks, scale=scale)


def make_backend(prefill: str = "own", device: str = "cpu") -> AttentionBackend:
    """Ours, with what attends for chunks by its settled name. Raises ValueError for one that isn't built, ImportError where a
    library is missing.
    """
    if prefill == "own":
        return KernelBackend()
    if prefill == "torch_native":
        return KernelBackend(sdpa_prefill)
    if prefill == "flashinfer":
        return KernelBackend(FlashInferPrefill(torch.device(device)))
    raise ValueError(f"prefill attention backend {prefill!r} is not built; choose 'own', 'torch_native' or 'flashinfer'")
