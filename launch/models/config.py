"""A model's configuration from its `config.json`, checked; unknown architectures are refused by name.

DeepSeek-V3, V3-0324, R1 and Kimi-K2 are one architecture with different numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.kernels.rope_config import RopeConfig, yarn_mscale

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
        raise ModelConfigError(
            f"no model at {str(folder)!r}: {path} does not exist. It must be a folder with config.json and *.safetensors "
            "(nothing is downloaded: `hf download NAME --local-dir DIR` does that)"
        )
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
        n_shared_experts=_count(raw, "n_shared_experts", 0),
        n_routed_experts=_positive(raw, "n_routed_experts"),
        routed_scaling_factor=_number(raw, "routed_scaling_factor", 1.0),
        kv_lora_rank=_positive(raw, "kv_lora_rank"),
        q_lora_rank=None if raw.get("q_lora_rank") is None else _positive(raw, "q_lora_rank"),
        qk_rope_head_dim=_positive(raw, "qk_rope_head_dim"),
        v_head_dim=_positive(raw, "v_head_dim"),
        qk_nope_head_dim=_positive(raw, "qk_nope_head_dim"),
        n_group=_positive(raw, "n_group") if raw.get("n_group") is not None else 1,
        topk_group=_positive(raw, "topk_group") if raw.get("topk_group") is not None else 1,
        num_experts_per_tok=_positive(raw, "num_experts_per_tok"),
        first_k_dense_replace=_count(raw, "first_k_dense_replace", 0),
        norm_topk_prob=_boolean(raw, "norm_topk_prob", True),
        max_position_embeddings=_positive(raw, "max_position_embeddings"),
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        tie_word_embeddings=_boolean(raw, "tie_word_embeddings", False),
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


def _count(raw: dict[str, Any], field: str, default: int) -> int:
    value = raw.get(field)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ModelConfigError(f"{field} must be an integer of at least 0, got {value!r}")
    return value


def _number(raw: dict[str, Any], field: str, default: float) -> float:
    value = raw.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ModelConfigError(f"{field} must be a positive number, got {value!r}")
    return float(value)


def _boolean(raw: dict[str, Any], field: str, default: bool) -> bool:
    value = raw.get(field, default)
    if not isinstance(value, bool):
        raise ModelConfigError(f"{field} must be true or false, got {value!r}")
    return value


def _rope(raw: dict[str, Any]) -> RopeConfig:
    """Reads both spellings: `rope_scaling` + `rope_theta` (released checkpoints) and transformers 5's `rope_parameters`."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ModelConfigError(f"rope_scaling (or rope_parameters) must be an object, got {given!r}")
    scaling = {name: value for name, value in given.items() if value is not None}
    theta = _number(scaling if "rope_theta" in scaling else raw, "rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    dim = _positive(raw, "qk_rope_head_dim")
    if kind == "default":
        return RopeConfig(dim=dim, theta=theta)
    if kind != "yarn":
        raise ModelConfigError(f"rope type {kind!r} is not served; only 'default' and 'yarn' are")
    if scaling.get("truncate", True) is not True:
        raise ModelConfigError(f"rope truncate = {scaling['truncate']!r} is not served; only true is")
    original = _positive(scaling, "original_max_position_embeddings")
    return RopeConfig(
        dim=dim,
        theta=theta,
        factor=_number(scaling, "factor", _positive(raw, "max_position_embeddings") / original),
        original_max_position=original,
        beta_fast=_number(scaling, "beta_fast", 32.0),
        beta_slow=_number(scaling, "beta_slow", 1.0),
        mscale=_number(scaling, "mscale", 0.0) if scaling.get("mscale") else 0.0,
        mscale_all_dim=_number(scaling, "mscale_all_dim", 0.0) if scaling.get("mscale_all_dim") else 0.0,
        attention_factor=_number(scaling, "attention_factor", 1.0) if "attention_factor" in scaling else None,
    )


def _eos(raw: dict[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ModelConfigError(f"eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def _fp8_block(raw: dict[str, Any]) -> tuple[int, int] | None:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise ModelConfigError(f"quantization_config must be an object, got {quantization!r}")
    if quantization.get("quant_method") != "fp8":
        raise ModelConfigError(f"quantization {quantization.get('quant_method')!r} is not served; only 'fp8' is")
    block = quantization.get("weight_block_size")
    if block != [128, 128]:
        raise ModelConfigError(f"weight_block_size {block!r} is not served; only [128, 128] is")
    return (128, 128)


def _check_experts(config: ModelConfig) -> None:
    if config.n_routed_experts % config.n_group:
        raise ModelConfigError(f"n_routed_experts {config.n_routed_experts} is no multiple of n_group {config.n_group}")
    if not 1 <= config.topk_group <= config.n_group:
        raise ModelConfigError(f"topk_group {config.topk_group} must lie in 1..n_group = {config.n_group}")
    if config.topk_group < config.n_group == config.n_routed_experts:
        raise ModelConfigError(f"n_group {config.n_group} leaves one expert per group; a group is scored by its two best experts")
    reachable = config.n_routed_experts // config.n_group * config.topk_group
    if config.num_experts_per_tok > reachable:
        raise ModelConfigError(
            f"num_experts_per_tok {config.num_experts_per_tok} exceeds the {reachable} experts of topk_group groups"
        )
