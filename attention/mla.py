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
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.metadata import AttentionMetadata, ExtendSequence
from moesaic.kernels.gemm import linear
from moesaic.kernels.latent_write import write_latent
from moesaic.kernels.norm import rms_norm
from moesaic.kernels.rope import apply_rope


@dataclass(frozen=True, kw_only=True)
class MLAWeights:
    """Weights of one rank, [out, in].

    `down` maps hidden to (query latent or the full queries, KV latent, rotary key) in one product; `q_up` maps the query latent to
    the rank's queries [N * (nope + rope), q_lora] (None when q_lora_rank is null: `down` holds the queries themselves).
    `kv_up_key` [N, nope, kv_lora] and `kv_up_value` [N, v, kv_lora] are the two halves of kv_b_proj; `output` [H, N * v].
    """

    down: Tensor
    q_norm: Tensor | None
    q_up: Tensor | None
    kv_norm: Tensor
    kv_up_key: Tensor
    kv_up_value: Tensor
    output: Tensor


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Queries of a step: without position [T, N, nope], and rotated [T, N, rope]."""

    nope: Tensor
    rope: Tensor


class MultiHeadLatentAttention:
    """Stage methods of one layer; the caller reduces the output over the attention-TP group."""

    def __init__(self, config: MLAConfig, weights: MLAWeights, layer: int, rope_table: Tensor) -> None:
        self._config = config
        self._weights = weights
        self._layer = layer
        self._rope_table = rope_table

    def prepare(self, hidden: Tensor, metadata: AttentionMetadata, pool: LatentKVPool) -> Queries:
        """hidden [T, H] (normalised) -> queries; writes the step's latent KV rows into the pool."""
        config, weights = self._config, self._weights
        projected = linear(hidden, weights.down, fp8_activations=config.fp8_activations)
        query_width = projected.shape[1] - config.latent_dim
        query, latent = torch.split(projected, [query_width, config.latent_dim], dim=1)
        if weights.q_up is not None:
            assert weights.q_norm is not None, "a query latent comes with its norm"
            query = rms_norm(query, weights.q_norm, config.rms_norm_eps)
            query = linear(query, weights.q_up, fp8_activations=config.fp8_activations)
        heads = query.view(-1, config.num_heads, config.qk_head_dim)
        nope, rope = torch.split(heads, [config.qk_nope_head_dim, config.qk_rope_head_dim], dim=2)
        write_latent(
            latent,
            weights.kv_norm,
            config.rms_norm_eps,
            table=self._rope_table,
            positions=metadata.positions,
            slots=metadata.slots,
            pool_rows=pool.rows(self._layer),
        )
        return Queries(nope=nope, rope=apply_rope(rope, self._rope_table, metadata.positions))

    def core(self, queries: Queries, metadata: AttentionMetadata, pool: LatentKVPool, backend: AttentionBackend) -> Tensor:
        """Attention output of this rank's heads, [T, N * v]."""
        parts = []
        if metadata.num_decode:
            parts.append(self._decode(queries, metadata, pool, backend))
        parts.extend(self._extend(queries, sequence, pool, backend) for sequence in metadata.extends)
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return queries.nope.new_zeros(0, self._config.num_heads * self._config.v_head_dim)
        return torch.cat(parts)

    def output(self, attended: Tensor) -> Tensor:
        """[T, N * v] -> this rank's partial sum of the output projection, [T, H]."""
        return linear(attended, self._weights.output, fp8_activations=self._config.fp8_activations)

    def _decode(self, queries: Queries, metadata: AttentionMetadata, pool: LatentKVPool, backend: AttentionBackend) -> Tensor:
        rows = metadata.num_decode
        absorbed = torch.bmm(queries.nope[:rows].transpose(0, 1), self._weights.kv_up_key).transpose(0, 1)
        query = torch.cat([absorbed, queries.rope[:rows]], dim=2)
        latent = backend.decode(
            query, pool, self._layer, metadata, value_dim=self._config.kv_lora_rank, scale=self._config.softmax_scale
        )
        value = torch.bmm(latent.transpose(0, 1), self._weights.kv_up_value.transpose(1, 2))
        return value.transpose(0, 1).reshape(rows, -1)

    def _extend(self, queries: Queries, sequence: ExtendSequence, pool: LatentKVPool, backend: AttentionBackend) -> Tensor:
        config, weights = self._config, self._weights
        rows = slice(sequence.start, sequence.start + sequence.length)
        context = backend.latent_context(pool, self._layer, sequence).to(queries.nope.dtype)
        latent, key_rope = torch.split(context, [config.kv_lora_rank, config.qk_rope_head_dim], dim=1)
        key = torch.cat(
            [
                torch.matmul(latent, weights.kv_up_key.transpose(1, 2)),
                key_rope.expand(config.num_heads, *key_rope.shape),
            ],
            dim=2,
        )
        value = torch.matmul(latent, weights.kv_up_value.transpose(1, 2))
        query = torch.cat([queries.nope[rows], queries.rope[rows]], dim=2).transpose(0, 1)
        attended = backend.extend(query, key, value, scale=config.softmax_scale)
        return attended.transpose(0, 1).reshape(sequence.length, -1)
