"""config.json: the released models are read with their right numbers; what moesaic doesn't serve is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_v3 import DEEPSEEK_V3

from moesaic.attention.kv_pool import LatentKVPool
from moesaic.kernels.quant import FP8
from moesaic.launch.models.config import ModelConfigError, load_model_config, parse_model_config

KIMI_K2: dict[str, Any] = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}


def _without(raw: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in fields}


def test_deepseek_v3_is_read_with_its_published_numbers() -> None:
    config = parse_model_config(DEEPSEEK_V3)
    for field in (
        "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
        "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor",
        "norm_topk_prob", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
        "first_k_dense_replace", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    ):  # fmt: skip
        assert getattr(config, field) == DEEPSEEK_V3[field], field
    assert config.architecture == "DeepseekV3ForCausalLM"
    assert config.eos_token_ids == (1,)
    assert config.fp8_block == (128, 128)
    assert config.sparse_layers == tuple(range(3, 61))
    rope = config.rope
    assert (rope.dim, rope.theta, rope.factor, rope.original_max_position) == (64, 10000.0, 40.0, 4096)
    assert (rope.beta_fast, rope.beta_slow, rope.mscale, rope.mscale_all_dim) == (32.0, 1.0, 1.0, 1.0)


def test_kimi_k2_is_the_same_architecture_with_its_own_numbers() -> None:
    config = parse_model_config(KIMI_K2)
    assert config.model_type == "kimi_k2"
    assert (config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group) == (384, 8, 1, 1)
    assert (config.num_attention_heads, config.routed_scaling_factor, config.vocab_size) == (64, 2.827, 163840)
    assert config.sparse_layers == tuple(range(1, 61))
    assert (config.rope.theta, config.rope.factor, config.rope.beta_fast) == (50000.0, 32.0, 1.0)
    assert config.eos_token_ids == (163585,)


@pytest.mark.parametrize(("raw", "factor"), [(DEEPSEEK_V3, 40), (KIMI_K2, 32)])
def test_the_softmax_scale_holds_yarns_temperature_squared(raw: dict[str, Any], factor: float) -> None:
    config = parse_model_config(raw)
    assert config.softmax_scale == pytest.approx((0.1 * math.log(factor) + 1) ** 2 / math.sqrt(192), rel=1e-12)
    plain = parse_model_config(_without(raw, "rope_scaling"))
    assert plain.rope.factor is None
    assert plain.softmax_scale == pytest.approx(1 / math.sqrt(192), rel=1e-12)


def test_a_token_of_deepseek_v3_costs_70272_bytes_of_kv_in_bfloat16() -> None:
    config = parse_model_config(DEEPSEEK_V3)
    assert config.latent_dim == 512 + 64
    assert LatentKVPool.bytes_per_token(config.num_hidden_layers, config.latent_dim, FP8) == 61 * 576
    assert LatentKVPool.bytes_per_token(61, config.latent_dim, torch.bfloat16) == 70_272


@pytest.mark.parametrize("raw", [DEEPSEEK_V3, KIMI_K2])
def test_both_spellings_of_rope_agree(raw: dict[str, Any]) -> None:
    released = dict(raw["rope_scaling"])
    kind = released.pop("type")
    newer = _without(raw, "rope_scaling", "rope_theta")
    newer["rope_parameters"] = released | {"rope_type": kind, "rope_theta": raw["rope_theta"]}
    assert parse_model_config(newer) == parse_model_config(raw)
    plain = _without(newer, "rope_parameters") | {"rope_parameters": {"rope_type": "default", "rope_theta": raw["rope_theta"]}}
    assert parse_model_config(plain) == parse_model_config(_without(raw, "rope_scaling"))


def test_optional_fields_have_their_defaults() -> None:
    config = parse_model_config(
        _without(DEEPSEEK_V3, "n_group", "topk_group", "eos_token_id", "quantization_config", "tie_word_embeddings")
        | {"q_lora_rank": None, "n_shared_experts": None}
    )
    assert (config.n_group, config.topk_group, config.eos_token_ids, config.fp8_block) == (1, 1, (), None)
    assert (config.q_lora_rank, config.n_shared_experts, config.tie_word_embeddings) == (None, 0, False)
    assert parse_model_config(DEEPSEEK_V3 | {"eos_token_id": [1, 2]}).eos_token_ids == (1, 2)
    assert parse_model_config(DEEPSEEK_V3 | {"first_k_dense_replace": 99}).sparse_layers == ()


@pytest.mark.parametrize("names", [["LlamaForCausalLM"], ["Qwen3MoeForCausalLM", "GlmForCausalLM"]])
def test_an_unknown_architecture_is_refused_by_name(names: list[str]) -> None:
    with pytest.raises(ModelConfigError, match=rf"'{names[0]}'.*not served.*DeepseekV3ForCausalLM"):
        parse_model_config(DEEPSEEK_V3 | {"architectures": names})


def test_a_config_without_architecture_is_refused_by_its_model_type() -> None:
    with pytest.raises(ModelConfigError, match="'deepseek_v3' is not served"):
        parse_model_config(_without(DEEPSEEK_V3, "architectures"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("hidden_act", "gelu"),
        ("rope_interleave", False),
        ("attention_bias", True),
        ("moe_layer_freq", 2),
    ],
)
def test_a_variation_nobody_released_is_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(ModelConfigError, match=f"{field} = {value!r} is not served"):
        parse_model_config(DEEPSEEK_V3 | {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", -1),
        ("hidden_size", None),
        ("hidden_size", "7168"),
        ("hidden_size", 7168.0),
        ("num_hidden_layers", True),
        ("vocab_size", None),
        ("q_lora_rank", 0),
        ("kv_lora_rank", "512"),
        ("max_position_embeddings", None),
        ("n_group", "8"),
        ("n_group", -8),
        ("n_group", 7),
        ("topk_group", 9),
        ("topk_group", "four"),
        ("num_experts_per_tok", 129),
        ("n_shared_experts", "one"),
        ("n_shared_experts", -1),
        ("first_k_dense_replace", "three"),
        ("first_k_dense_replace", -1),
        ("routed_scaling_factor", "big"),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", None),
        ("rope_theta", "ten thousand"),
        ("norm_topk_prob", "false"),
        ("tie_word_embeddings", "false"),
        ("eos_token_id", "end"),
        ("eos_token_id", [1, "end"]),
        ("rope_scaling", "yarn"),
        ("rope_scaling", {"type": "linear", "factor": 4.0}),
        ("rope_scaling", {"type": "yarn", "factor": 40}),
        ("rope_scaling", {"type": "yarn", "factor": "x", "original_max_position_embeddings": 4096}),
        ("rope_scaling", {"type": "yarn", "factor": 40, "original_max_position_embeddings": 0}),
        ("rope_scaling", {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "truncate": False}),
        ("quantization_config", "fp8"),
        ("quantization_config", {"quant_method": "awq"}),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 128]}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": 128}),
        ("architectures", "DeepseekV3ForCausalLM"),
    ],
)
def test_a_bad_field_is_refused_and_named(field: str, value: object) -> None:
    """By its own name, or by that of the part of it that is wrong."""
    part = {"rope_scaling": "rope|original_max_position|factor", "quantization_config": "quantization|weight_block_size"}
    part["architectures"] = "architecture"
    with pytest.raises(ModelConfigError, match=part.get(field, field)):
        parse_model_config(DEEPSEEK_V3 | {field: value})


def test_groups_of_one_expert_can_not_be_scored_by_their_two_best() -> None:
    with pytest.raises(ModelConfigError, match="n_group"):
        parse_model_config(DEEPSEEK_V3 | {"n_group": 256, "topk_group": 16})


def test_the_file_is_named_when_it_is_missing_broken_or_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"config\.json does not exist"):
        load_model_config(tmp_path)
    path = tmp_path / "config.json"
    for text, complaint in (("{", "not valid JSON"), ("[]", "holds a list"), ('"\\ud800', "not valid JSON")):
        path.write_text(text)
        with pytest.raises(ModelConfigError, match=rf"config\.json.*{complaint}"):
            load_model_config(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelConfigError, match=r"config\.json.*not valid JSON"):
        load_model_config(tmp_path)
    path.write_text(json.dumps(DEEPSEEK_V3 | {"hidden_size": 0}))
    with pytest.raises(ModelConfigError, match=r"config\.json: hidden_size must be a positive integer, got 0"):
        load_model_config(tmp_path)
    path.write_text(json.dumps(DEEPSEEK_V3))
    assert load_model_config(tmp_path) == parse_model_config(DEEPSEEK_V3)
