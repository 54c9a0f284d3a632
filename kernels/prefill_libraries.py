"""Other libraries' attention for prefill, behind the contract of `mla_prefill`: torch's own and FlashInfer's. Not run on hardware.

Both want keys per token with the rotary part beside them, which is written here once per layer; our Triton kernel reads the two
parts where they lie.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from moesaic.kernels.gpu import upload

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer's own examples give it."""


class Prefill(Protocol):
    """As `mla_prefill.mla_prefill`."""

    def __call__(self, query: Tensor, key: Tensor, key_rope: Tensor, value: Tensor, chunks: Tensor, *, scale: float) -> Tensor: ...


def sdpa_prefill(query: Tensor, key: Tensor, key_rope: Tensor, value: Tensor, chunks: Tensor, *, scale: float) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, chunk by chunk, without a mask in memory where its kernels need none."""
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    keys = _joined(key, key_rope)
    for first_row, num_rows, first_key, prefix in chunks.tolist():
        rows, context = slice(first_row, first_row + num_rows), slice(first_key, first_key + prefix + num_rows)
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[None, rows].transpose(1, 2),
            keys[None, context].transpose(1, 2),
            value[None, context].transpose(1, 2),
            attn_mask=causal_lower_right(num_rows, prefix + num_rows) if prefix else None,
            is_causal=not prefix,
            scale=scale,
        )
        out[rows] = attended[0].transpose(0, 1)
    return out


class FlashInferPrefill:
    """FlashInfer's ragged prefill. A plan is made once for the layers of a step: they share `chunks`."""

    def __init__(self, device: torch.device) -> None:
        """Raises ImportError where FlashInfer is missing."""
        import flashinfer  # type: ignore[import-not-found]

        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper: Any = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        self._planned: Tensor | None = None
        self._rows = self._contexts = torch.empty(0, dtype=torch.int64, device=device)

    def __call__(self, query: Tensor, key: Tensor, key_rope: Tensor, value: Tensor, chunks: Tensor, *, scale: float) -> Tensor:
        if self._planned is not chunks:
            self._plan(query, value, chunks, scale)
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        keys = _joined(key, key_rope).index_select(0, self._contexts)
        attended = self._wrapper.run(query.index_select(0, self._rows), keys, value.index_select(0, self._contexts))
        return out.index_copy_(0, self._rows, attended)

    def _plan(self, query: Tensor, value: Tensor, chunks: Tensor, scale: float) -> None:
        """Queries and contexts one after the other, without what lies between them (the rest of a context's last page)."""
        parts = chunks.tolist()
        rows = [torch.arange(first, first + count) for first, count, _, _ in parts]
        contexts = [torch.arange(first, first + prefix + count) for _, count, first, prefix in parts]
        self._rows, self._contexts = upload(torch.cat(rows), query.device), upload(torch.cat(contexts), query.device)
        self._wrapper.plan(
            _starts(rows, query.device),
            _starts(contexts, query.device),
            query.shape[1],
            query.shape[1],
            query.shape[2],
            head_dim_vo=value.shape[2],
            causal=True,
            sm_scale=scale,
            q_data_type=query.dtype,
        )
        self._planned = chunks


def _joined(key: Tensor, key_rope: Tensor) -> Tensor:
    """key [heads, K, L], key_rope [R, L] -> [L, heads, K + R]."""
    return torch.cat([key, key_rope.expand(key.shape[0], -1, -1)], dim=1).permute(2, 0, 1).contiguous()


def _starts(parts: list[Tensor], device: torch.device) -> Tensor:
    """int32 [S + 1]: where each part begins when they lie one after the other."""
    lengths = torch.tensor([0, *(len(part) for part in parts)], dtype=torch.int32)
    return upload(lengths.cumsum(0, dtype=torch.int32), device)
