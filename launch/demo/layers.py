"""The dense parts of a decoder layer, in the released checkpoints' names: linear, norm, SwiGLU and latent attention.

Weights are float32; matrices are multiplied in their input's dtype.

Shape letters: B sequences, S positions, H hidden.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.launch.demo.config import DemoConfig
from moesaic.launch.demo.functions import causal_attention, rms_norm


class Linear(nn.Module):
    """A bias-free linear layer that multiplies in its input's dtype. weight [out, in] float32."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_outputs, num_inputs) * num_inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm, float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_table(config: DemoConfig, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin [S, qk_rope_head_dim / 2] float32."""
    dim = config.qk_rope_head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns interleaved pairs by their position. x [B, S, heads, D] -> same, first members then second."""
    cos, sin = (table[:, None].to(x.dtype) for table in rotary)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class MLP(nn.Module):
    """SwiGLU, as in the dense layer and the shared expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Attention(nn.Module):
    """Multi-head latent attention (MLA), with the latents expanded as in prefill."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden, eps = config.num_attention_heads, config.hidden_size, config.rms_norm_eps
        self.q_a_proj = Linear(hidden, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
        self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        c = self.config
        batch, length, heads = x.shape[0], x.shape[1], c.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(batch, length, heads, c.qk_head_dim)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, length, heads, -1)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = rotate(k_rope[:, :, None], rotary).expand(-1, -1, heads, -1)
        q = torch.cat((q_nope, rotate(q_rope, rotary)), -1)
        k = torch.cat((k_nope, k_rope), -1)
        q, k, v = (t.transpose(1, 2).reshape(batch * heads, length, -1) for t in (q, k, v))
        out = causal_attention(q, k, v, c.qk_head_dim**-0.5)
        merged: Tensor = self.o_proj(out.view(batch, heads, length, -1).transpose(1, 2).reshape(batch, length, -1))
        return merged
