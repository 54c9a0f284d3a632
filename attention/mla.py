"""Multi-head latent attention of one layer on one attention-TP rank (DeepSeek-V2, section 2.1).

Decode rows use the absorbed form (queries are mapped into the latent space; the cache is read once for all heads), extend rows the
materialised form (keys and values are expanded once, then cheap per-head products). Shapes: T tokens, H hidden, N heads of this
rank, D = kv_lora_rank + rope.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.attention.backend import AttentionBackend
from moesaic.attention.config import MLAConfig
from moesaic.attention.extend_groups import ExtendGroup
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.metadata import AttentionMetadata
from moesaic.kernels.fp8_rows import normed_rows
from moesaic.kernels.gemm import Matrix, Rows, is_fp8, linear
from moesaic.kernels.head_product import head_product
from moesaic.kernels.latent_write import write_latent
from moesaic.kernels.mla_prefill import padded_rows
from moesaic.kernels.norm import rms_norm
from moesaic.kernels.rope import apply_rope


@dataclass(frozen=True, kw_only=True)
class MLAWeights:
    """Weights of one rank, [out, in].

    `down` maps hidden to (query latent or the full queries, KV latent, rotary key) in one product; `q_up` maps the query latent to
    the rank's queries [N * (nope + rope), q_lora] (None when q_lora_rank is null: `down` holds the queries themselves).
    `kv_up_key` [N, nope, kv_lora] and `kv_up_value` [N, v, kv_lora] are the two halves of kv_b_proj (N and v should run
    fastest in the memory of kv_up_value: decode reads it with v as columns), never in FP8, as absorbed they meet queries and sums
    that are not quantised; `output` [H, N * v].
    """

    down: Matrix
    q_norm: Tensor | None
    q_up: Matrix | None
    kv_norm: Tensor
    kv_up_key: Tensor
    kv_up_value: Tensor
    output: Matrix


class MultiHeadLatentAttention:
    """Stage methods of one layer; the caller reduces the output over the attention-TP group."""

    def __init__(self, config: MLAConfig, weights: MLAWeights, layer: int, rope_table: Tensor) -> None:
        self._config = config
        self._weights = weights
        self._layer = layer
        self._rope_table = rope_table

    @property
    def takes_fp8(self) -> bool:
        """Whether normalised rows had best come in FP8."""
        return is_fp8(self._weights.down)

    def prepare(self, hidden: Rows, metadata: AttentionMetadata, pool: LatentKVPool) -> Tensor:
        """hidden [T, H] (normalised) -> queries [T, N, nope + rope], rotated; writes the step's latent KV rows into the pool."""
        config, weights = self._config, self._weights
        projected = linear(hidden, weights.down, fp8_activations=config.fp8_activations)
        query_width = projected.shape[1] - config.latent_dim
        query, latent = projected[:, :query_width], projected[:, query_width:]
        if weights.q_up is not None:
            assert weights.q_norm is not None, "a query latent comes with its norm"
            norm = normed_rows if is_fp8(weights.q_up) else rms_norm
            query = linear(norm(query, weights.q_norm, config.rms_norm_eps), weights.q_up, fp8_activations=config.fp8_activations)
        heads = query.view(-1, config.num_heads, config.qk_head_dim)
        write_latent(
            latent,
            weights.kv_norm,
            config.rms_norm_eps,
            table=self._rope_table,
            positions=metadata.positions,
            slots=metadata.slots,
            pool_rows=pool.rows(self._layer),
        )
        apply_rope(heads[..., config.qk_nope_head_dim :], self._rope_table, metadata.positions)
        return heads

    def core(self, queries: Tensor, metadata: AttentionMetadata, pool: LatentKVPool, backend: AttentionBackend) -> Tensor:
        """Attention output of this rank's heads, [T, N * v]."""
        parts = []
        if metadata.num_decode:
            parts.append(self._decode(queries, metadata, pool, backend))
        parts.extend(self._extend(queries, group, pool, backend) for group in metadata.extend_groups(pool.page_size))
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return queries.new_zeros(0, self._config.num_heads * self._config.v_head_dim)
        return torch.cat(parts)

    def blank_queries(self, num_tokens: int) -> Tensor:
        """Queries as `prepare` gives them, all zero."""
        heads = self._config.num_heads, self._config.qk_head_dim
        return self._weights.kv_norm.new_zeros(num_tokens, *heads)

    def output(self, attended: Tensor) -> Tensor:
        """[T, N * v] -> this rank's partial sum of the output projection, [T, H]."""
        return linear(attended, self._weights.output, fp8_activations=self._config.fp8_activations)

    def _decode(self, queries: Tensor, metadata: AttentionMetadata, pool: LatentKVPool, backend: AttentionBackend) -> Tensor:
        config, weights = self._config, self._weights
        rows = metadata.num_decode
        query = head_product(queries[:rows], weights.kv_up_key, tail=config.qk_rope_head_dim)
        latent = backend.decode(query, pool, self._layer, metadata, value_dim=config.kv_lora_rank, scale=config.softmax_scale)
        return head_product(latent, weights.kv_up_value.transpose(1, 2)).view(rows, -1)

    def _extend(self, queries: Tensor, group: ExtendGroup, pool: LatentKVPool, backend: AttentionBackend) -> Tensor:
        config, weights = self._config, self._weights
        query = queries[group.start : group.stop].contiguous()
        context = backend.latent_context(pool, self._layer, group.pages).to(query.dtype)
        latent, length = context[:, : config.kv_lora_rank], len(context)
        key = padded_rows(query, config.num_heads * config.qk_nope_head_dim, length)
        torch.mm(weights.kv_up_key.flatten(0, 1), latent.t(), out=key)
        key_rope = padded_rows(query, config.qk_rope_head_dim, length).copy_(context[:, config.kv_lora_rank :].t())
        value = torch.mm(latent, weights.kv_up_value.flatten(0, 1).t())
        attended = backend.extend(
            query,
            key.view(config.num_heads, config.qk_nope_head_dim, length),
            key_rope,
            value.view(length, config.num_heads, config.v_head_dim),
            group.chunks,
            scale=config.softmax_scale,
        )
        return attended.view(len(query), -1)
