"""What multi-head latent attention (MLA) needs to know of a model."""

from __future__ import annotations

from dataclasses import dataclass

MAX_GROUP_TOKENS = 8192
"""Sequences share a group while their contexts have at most this many tokens, which bounds the memory of their keys and values."""


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Sizes of one attention layer on one attention-TP rank. `num_heads`: the rank's own; `softmax_scale` includes YaRN's."""

    num_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    softmax_scale: float
    rms_norm_eps: float
    fp8_activations: bool = False

    @property
    def latent_dim(self) -> int:
        """Elements per token and layer in the KV pool: the latent and the shared rotary key, nothing more."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim
