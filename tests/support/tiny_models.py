"""Tiny random DeepSeek-V3 checkpoints, and HF transformers as the oracle of what they say.

Checkpoints are written in the released on-disk form (sharded safetensors with an index, per-expert names, optionally FP8 blocks).
The oracle runs the same weights (dequantised) in fp32 with eager experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moesaic.kernels.quant import FP8, dequantize_blocks, quantize_blocks

BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "qk_nope_head_dim": 24,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "q_full": {"q_lora_rank": None},
    "one_group": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 256},
    "fp8": {"hidden_size": 192, "intermediate_size": 160, "fp8": True},
    "tied": {"tie_word_embeddings": True, "n_shared_experts": 2},
    "kimi": {"n_routed_experts": 384, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 8, "model_type": "kimi_k2"},
}
"""Each exercises one corner: null q_lora_rank, a single expert group, YaRN, FP8 blocks (ragged), a tied head, 384 experts top-8."""

QUANTIZED = (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint folder and the oracle with the same weights."""

    folder: Path
    oracle: DeepseekV3ForCausalLM
    vocab_size: int

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The oracle's greedy continuation (end-of-sequence ids are not special)."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """fp32 [len(tokens), V]."""
        return self.oracle(torch.tensor([tokens])).logits[0].float()

    def prompt_logprobs(self, tokens: list[int]) -> list[float]:
        """Log probability of each token but the first."""
        logprobs = self.logits(tokens).log_softmax(-1)
        return [float(logprobs[position, token]) for position, token in enumerate(tokens[1:])]


def make_tiny_model(folder: Path, variant: str = "plain", seed: int = 0, **overrides: Any) -> TinyModel:
    """Write a random checkpoint of a variant into `folder` and build its oracle."""
    settings = {**BASE, **VARIANTS[variant], **overrides}
    fp8 = settings.pop("fp8", False)
    model_type = settings.pop("model_type", "deepseek_v3")
    config = DeepseekV3Config(**settings)
    model = DeepseekV3ForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    _randomize(model, seed)
    weights = _checkpoint_weights(model, tied=config.tie_word_embeddings)
    if fp8:
        weights = _quantize(model, weights)
    raw = {**settings, "architectures": ["DeepseekV3ForCausalLM"], "model_type": model_type}
    raw |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu", "torch_dtype": "bfloat16"}
    if fp8:
        raw["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    _save(folder, weights)
    return TinyModel(folder=folder, oracle=model, vocab_size=config.vocab_size)


@torch.no_grad()
def _randomize(model: DeepseekV3ForCausalLM, seed: int) -> None:
    """Weights large enough that greedy choices are clear, norms and biases that would show if they were ignored."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.copy_(1 + 0.1 * noise)
        else:
            parameter.copy_(noise * (1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.05 * torch.randn(buffer.shape, generator=generator))


def _checkpoint_weights(model: DeepseekV3ForCausalLM, *, tied: bool) -> dict[str, Tensor]:
    """The model's state under the released names, one tensor per expert."""
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            for expert, gate_up in enumerate(value):
                gate, up = gate_up.chunk(2)
                weights[f"{stem}.{expert}.gate_proj.weight"] = gate.contiguous()
                weights[f"{stem}.{expert}.up_proj.weight"] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix(".down_proj")
            for expert, down in enumerate(value):
                weights[f"{stem}.{expert}.down_proj.weight"] = down.contiguous()
        elif not (tied and name == "lm_head.weight"):
            weights[name] = value.clone()
    return weights


@torch.no_grad()
def _quantize(model: DeepseekV3ForCausalLM, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantise what the released checkpoints quantise; the oracle gets the dequantised values."""
    out: dict[str, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.removesuffix(".weight").rsplit(".", 1)[-1] in QUANTIZED:
            quantized, scales = quantize_blocks(value)
            out[name], out[f"{name}_scale_inv"] = quantized, scales
            rounded[name] = dequantize_blocks(quantized, scales, torch.float32)
            assert quantized.dtype == FP8
        else:
            out[name] = value
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            for expert in range(len(value)):
                parts = [rounded[f"{stem}.{expert}.{part}_proj.weight"] for part in ("gate", "up")]
                value[expert].copy_(torch.cat(parts))
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix(".down_proj")
            for expert in range(len(value)):
                value[expert].copy_(rounded[f"{stem}.{expert}.down_proj.weight"])
        elif name in rounded:
            value.copy_(rounded[name])
    return out


def _save(folder: Path, weights: dict[str, Tensor]) -> None:
    """Two shards and an index, as released."""
    names = sorted(weights)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights[name] for name in shard}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
