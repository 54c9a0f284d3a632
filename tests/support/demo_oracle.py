"""The demo model with HF transformers as its oracle."""

from __future__ import annotations

import json
from functools import cache

from tiny_models import TinyModel
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moesaic.launch.demo import CHECKPOINT_DIR
from moesaic.launch.demo.restore import hf_state_dict


@cache
def demo_model() -> TinyModel:
    """Its FP8 weights dequantised, computed in fp32."""
    raw = json.loads((CHECKPOINT_DIR / "config.json").read_text(encoding="utf-8"))
    config = DeepseekV3Config(**{key: value for key, value in raw.items() if key != "quantization_config"})
    config._attn_implementation = config._experts_implementation = "eager"
    oracle = DeepseekV3ForCausalLM(config).eval()
    oracle.load_state_dict(hf_state_dict(CHECKPOINT_DIR))
    return TinyModel(folder=CHECKPOINT_DIR, oracle=oracle, vocab_size=config.vocab_size)
