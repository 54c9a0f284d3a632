"""Rotary embedding: the same dot products as HF's interleaved form, and YaRN's published frequencies and magnitude."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, apply_rotary_pos_emb_interleave

from moesaic.kernels.rope import apply_rope, apply_rope_reference, rope_frequencies, rope_table
from moesaic.kernels.rope_config import RopeConfig, yarn_mscale

YARNS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {"theta": 10000.0, "factor": 40.0, "original": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    "kimi-k2": {
        "theta": 50000.0, "factor": 32.0, "original": 4096, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0,
    },
    "short": {"theta": 10000.0, "dim": 16, "factor": 4.0, "original": 64, "mscale": 1.0, "mscale_all_dim": 1.0},
    "unequal mscales": {"theta": 10000.0, "factor": 40.0, "original": 4096, "mscale": 0.707, "mscale_all_dim": 1.0},
    "no mscale": {"theta": 10000.0, "factor": 8.0, "original": 128},
    "given magnitude": {"theta": 10000.0, "factor": 8.0, "original": 128, "attention_factor": 1.5},
}  # fmt: skip


def _hf(dim: int, theta: float, **yarn: Any) -> DeepseekV3RotaryEmbedding:
    scaling = {"rope_type": "yarn", "rope_theta": theta, **yarn} if yarn else {"rope_type": "default", "rope_theta": theta}
    config = DeepseekV3Config(qk_rope_head_dim=dim, max_position_embeddings=163840, rope_parameters=scaling)
    return DeepseekV3RotaryEmbedding(config)


def _pair(name: str) -> tuple[RopeConfig, DeepseekV3RotaryEmbedding]:
    """Our configuration and HF's module for the same constants."""
    if name == "plain":
        return RopeConfig(dim=64, theta=10000.0), _hf(64, 10000.0)
    settings = dict(YARNS[name])
    original, dim = settings.pop("original"), settings.pop("dim", 64)
    theta = settings.pop("theta")
    ours = RopeConfig(dim=dim, theta=theta, original_max_position=original, **settings)
    return ours, _hf(dim, theta, original_max_position_embeddings=original, **settings)


@pytest.mark.parametrize("name", YARNS)
def test_yarn_frequencies_and_magnitude_are_those_of_transformers(name: str) -> None:
    ours, hf = _pair(name)
    torch.testing.assert_close(rope_frequencies(ours), hf.inv_freq, rtol=1e-6, atol=0)
    magnitude = rope_table(ours, 1).abs()
    torch.testing.assert_close(magnitude, torch.full_like(magnitude, hf.attention_scaling), rtol=1e-6, atol=0)


def test_yarn_keeps_the_fastest_pairs_and_stretches_the_slowest_by_the_factor() -> None:
    plain = rope_frequencies(RopeConfig(dim=64, theta=10000.0))
    yarn = rope_frequencies(RopeConfig(dim=64, theta=10000.0, factor=40.0))
    assert yarn[0] == plain[0]
    torch.testing.assert_close(yarn[-1], plain[-1] / 40)


@pytest.mark.parametrize("name", ["plain", *YARNS])
def test_dot_products_equal_those_of_hf_interleaved_rope(name: str) -> None:
    ours, hf = _pair(name)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(11, 3, ours.dim, generator=generator) for _ in range(2))
    positions = torch.tensor([0, 1, 2, 3, 5, 8, 63, 64, 200, 255, 511])
    cos, sin = hf(query, positions.unsqueeze(0))
    hf_query, hf_key = apply_rotary_pos_emb_interleave(query.unsqueeze(0), key.unsqueeze(0), cos, sin, unsqueeze_dim=2)
    table = rope_table(ours, 512)
    expected = torch.einsum("ihd,jhd->hij", hf_query[0], hf_key[0])
    for rotate in (apply_rope_reference, apply_rope):
        products = torch.einsum("ihd,jhd->hij", rotate(query, table, positions), rotate(key, table, positions))
        torch.testing.assert_close(products, expected, rtol=1e-4, atol=1e-4)


def test_a_dot_product_depends_on_the_distance_of_positions_only() -> None:
    table = rope_table(RopeConfig(dim=32, theta=10000.0), 400)
    query, key = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(1))
    rotated = [apply_rope(x.clone(), table, torch.tensor([at])) for x, at in ((query, 7), (key, 3), (query, 307), (key, 303))]
    near, far = (rotated[0] * rotated[1]).sum(), (rotated[2] * rotated[3]).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_position_zero_changes_nothing_and_dtype_and_empty_input_are_kept() -> None:
    table = rope_table(RopeConfig(dim=8, theta=10000.0), 4)
    x = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(apply_rope(x, table, torch.tensor([0])), x)
    assert apply_rope(x[:0], table, torch.tensor([], dtype=torch.long)).shape == (0, 2, 8)


def test_a_context_that_is_not_stretched_has_temperature_one() -> None:
    assert yarn_mscale(1.0, 1.0) == 1.0
    assert yarn_mscale(0.5, 1.0) == 1.0
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.3688879454)
