"""A model's configuration from its `config.json`, checked; unknown architectures are refused by name.

DeepSeek-V3, V3-0324, R1 and Kimi-K2 are one architecture with different numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.kernels.rope import RopeConfig, yarn_mscale

ARCHITECTURES = ("DeepseekV3ForCausalLM",)


class ModelConfigError(ValueError):
    """A config.json that is missing, unreadable, or describes a model that moesaic doesn't serve."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """DeepSeek-V3's numbers, named as in config.json. `fp8_block` is (128, 128) for FP8 checkpoints, else None."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    routed_scaling_factor: float
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_rope_head_dim: int
    v_head_dim: int
    qk_nope_head_dim: int
    n_group: int
    topk_group: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    norm_topk_prob: bool
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    fp8_block: tuple[int, int] | None

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(qk_head_dim), times the square of YaRN's mscale over all dimensions."""
        scale = float((self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5)
        if self.rope.factor is not None and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale

    @property
    def latent_dim(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(range(min(self.first_k_dense_replace, self.num_hidden_layers), self.num_hidden_layers))


def load_model_config(folder: str | Path) -> ModelConfig:
    """Read and check `folder/config.json`. Raises ModelConfigError that names the file and the field."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelConfigError(f"no model at {str(folder)!r}: {path} does not exist")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelConfigError(f"{path} holds a {type(raw).__name__}, not an object")
    try:
        return parse_model_config(raw)
    except ModelConfigError as error:
        raise ModelConfigError(f"{path}: {error}") from error


def parse_model_config(raw: dict[str, Any]) -> ModelConfig:
    """config.json's object -> ModelConfig. Raises ModelConfigError that names the field."""
    architecture = _architecture(raw)
    _refuse_unserved(raw)
    config = ModelConfig(
        architecture=architecture,
        model_type=str(raw.get("model_type", "deepseek_v3")),
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=_positive(raw, "hidden_size"),
        intermediate_size=_positive(raw, "intermediate_size"),
        moe_intermediate_size=_positive(raw, "moe_intermediate_size"),
        num_hidden_layers=_positive(raw, "num_hidden_layers"),
        num_attention_heads=_positive(raw, "num_attention_heads"),
        n_shared_experts=int(raw.get("n_shared_experts") or 0),
        n_routed_experts=_positive(raw, "n_routed_experts"),
        routed_scaling_factor=float(raw.get("routed_scaling_factor", 1.0)),
        kv_lora_rank=_positive(raw, "kv_lora_rank"),
        q_lora_rank=None if raw.get("q_lora_rank") is None else _positive(raw, "q_lora_rank"),
        qk_rope_head_dim=_positive(raw, "qk_rope_head_dim"),
        v_head_dim=_positive(raw, "v_head_dim"),
        qk_nope_head_dim=_positive(raw, "qk_nope_head_dim"),
        n_group=int(raw.get("n_group") or 1),
        topk_group=int(raw.get("topk_group") or 1),
        num_experts_per_tok=_positive(raw, "num_experts_per_tok"),
        first_k_dense_replace=int(raw.get("first_k_dense_replace", 0)),
        norm_topk_prob=bool(raw.get("norm_topk_prob", True)),
        max_position_embeddings=_positive(raw, "max_position_embeddings"),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope=_rope(raw),
        eos_token_ids=_eos(raw),
        fp8_block=_fp8_block(raw),
    )
    _check_experts(config)
    return config


def _architecture(raw: dict[str, Any]) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    raise ModelConfigError(f"architecture {names or raw.get('model_type')!r} is not served; moesaic serves {ARCHITECTURES}")


def _refuse_unserved(raw: dict[str, Any]) -> None:
    """Variations of the architecture that no released checkpoint uses."""
    expected = {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "rope_interleave": True,
        "attention_bias": False,
        "moe_layer_freq": 1,
    }
    for field, value in expected.items():
        if raw.get(field, value) != value:
            raise ModelConfigError(f"{field} = {raw[field]!r} is not served; only {value!r} is")


def _positive(raw: dict[str, Any], field: str) -> int:
    value = raw.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelConfigError(f"{field} must be a positive integer, got {value!r}")
    return value


def _rope(raw: dict[str, Any]) -> RopeConfig:
    """Reads both spellings: `rope_scaling` + `rope_theta` (released checkpoints) and transformers 5's `rope_parameters`."""
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    dim = _positive(raw, "qk_rope_head_dim")
    if kind == "default":
        return RopeConfig(dim=dim, theta=theta)
    if kind != "yarn":
        raise ModelConfigError(f"rope type {kind!r} is not served; only 'default' and 'yarn' are")
    original = int(scaling["original_max_position_embeddings"])
    attention_factor = scaling.get("attention_factor")
    return RopeConfig(
        dim=dim,
        theta=theta,
        factor=float(scaling.get("factor") or raw["max_position_embeddings"] / original),
        original_max_position=original,
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        mscale=float(scaling.get("mscale") or 0),
        mscale_all_dim=float(scaling.get("mscale_all_dim") or 0),
        attention_factor=None if attention_factor is None else float(attention_factor),
    )


def _eos(raw: dict[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _fp8_block(raw: dict[str, Any]) -> tuple[int, int] | None:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return None
    if quantization.get("quant_method") != "fp8":
        raise ModelConfigError(f"quantization {quantization.get('quant_method')!r} is not served; only 'fp8' is")
    block = tuple(quantization.get("weight_block_size") or ())
    if block != (128, 128):
        raise ModelConfigError(f"weight_block_size {list(block)} is not served; only [128, 128] is")
    return (128, 128)


def _check_experts(config: ModelConfig) -> None:
    if config.n_routed_experts % config.n_group:
        raise ModelConfigError(f"n_routed_experts {config.n_routed_experts} is no multiple of n_group {config.n_group}")
    if not 1 <= config.topk_group <= config.n_group:
        raise ModelConfigError(f"topk_group {config.topk_group} must lie in 1..n_group = {config.n_group}")
    reachable = config.n_routed_experts // config.n_group * config.topk_group
    if config.num_experts_per_tok > reachable:
        raise ModelConfigError(
            f"num_experts_per_tok {config.num_experts_per_tok} exceeds the {reachable} experts of topk_group groups"
        )
