"""Shapes of the demo model, under the names that the released checkpoints use in config.json.

`num_hidden_layers` counts the main model only; the multi-token-prediction (MTP) layers follow it, so the first MTP
layer has index `num_hidden_layers`.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Every field is a key of config.json. Defaults are the demo model's."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 5
    num_nextn_predict_layers: int = 1
    first_k_dense_replace: int = 1
    n_routed_experts: int = 32
    n_shared_experts: int = 1
    n_group: int = 8
    topk_group: int = 4
    num_experts_per_tok: int = 4
    routed_scaling_factor: float = 2.0
    num_attention_heads: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without position followed by the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_layers(self) -> int:
        """Main layers and MTP layers together."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @property
    def sparse_layer_ids(self) -> list[int]:
        """Indices of the main model's sparse layers (the MTP layer, sparse too, is not among them)."""
        return list(range(self.first_k_dense_replace, self.num_hidden_layers))

    def to_hf(self) -> dict[str, Any]:
        """The fields of config.json that describe the architecture (token ids and quantisation are the exporter's)."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **dataclasses.asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "moe_layer_freq": 1,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "rope_interleave": True,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }
