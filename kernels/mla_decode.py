"""MLA decode in absorbed form: queries meet the latent KV directly (DeepSeek-V2, section 2.1.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def mla_decode(query: Tensor, latent: Tensor, bias: Tensor, *, value_dim: int, scale: float) -> Tensor:
    """One query token per sequence over that sequence's latent rows.

    query [B, heads, D] (absorbed latent part, then rotary part), latent [B, L, D] (rows past a sequence's end may hold anything
    finite), bias fp32 [B, 1, L] (-inf past the end) -> [B, heads, value_dim]. Softmax in fp32.
    """
    scores = torch.baddbmm(bias, query.float(), latent.float().transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1).to(latent.dtype), latent[..., :value_dim])
