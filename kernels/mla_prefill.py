"""MLA prefill in materialised form: keys and values are expanded from the latent, then ordinary causal attention."""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 1024


def mla_prefill(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """query [heads, T, D], key [heads, L, D], value [heads, L, V] with L >= T -> [heads, T, V].

    The queries are the last T of the L positions. Long chunks run in blocks of queries so that no mask is larger than
    QUERY_BLOCK x L and no block attends beyond its own last position.
    """
    num_queries, length = query.shape[1], key.shape[1]
    prefix = length - num_queries
    blocks = []
    for start in range(0, num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_queries)
        visible = prefix + stop
        mask = torch.ones(stop - start, visible, dtype=torch.bool, device=query.device).tril(prefix + start)
        blocks.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[None, :, start:stop],
                key[None, :, :visible],
                value[None, :, :visible],
                attn_mask=mask,
                scale=scale,
            )[0]
        )
    if not blocks:
        return query.new_empty(*query.shape[:2], value.shape[2])
    return torch.cat(blocks, dim=1) if len(blocks) != 1 else blocks[0]
