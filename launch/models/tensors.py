"""Every tensor that serving a DeepSeek-V3 reads, as data: name, shape, kind, and how a layout cuts it. Knows no weights.

`build.py` is what really asks for them; the tests hold the two together. MTP layers are in checkpoints and are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from moesaic.launch.models.config import ModelConfig

Kind = Literal["attention", "dense layers", "shared experts", "routed experts", "gates and norms", "embedding and head"]
Cut = Literal["whole", "attention", "dense", "shared", "expert", "head"]
FP8_BLOCK = 128
FP8_KINDS: frozenset[Kind] = frozenset({"attention", "dense layers", "shared experts", "routed experts"})
"""Of these, FP8 checkpoints store matrices as blocks."""
KINDS: tuple[Kind, ...] = (
    "attention",
    "dense layers",
    "shared experts",
    "routed experts",
    "gates and norms",
    "embedding and head",
)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """`shape` of the whole tensor. A rank holds one of the equal parts along `dim` that the layout makes of `cut`.

    `blocks`: released FP8 checkpoints store it as e4m3 with a scale per 128x128. `absorbed`: it is never computed with in FP8
    (kv_b_proj, whose halves meet queries and sums of attention). `fp32`: is float32 whatever the dtype.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    cut: Cut = "whole"
    dim: int = 0
    blocks: bool = False
    absorbed: bool = False
    fp32: bool = False

    def part(self, parts: int) -> tuple[int, ...]:
        """The shape of one of `parts` equal parts."""
        return tuple(size // parts if dim == self.dim else size for dim, size in enumerate(self.shape))


def model_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """All tensors of the model."""
    yield from tensors_without_experts(config)
    for layer in config.sparse_layers:
        for expert in range(config.n_routed_experts):
            yield from expert_tensors(config, layer, expert)


def tensors_without_experts(config: ModelConfig) -> Iterator[TensorSpec]:
    """All tensors but those of routed experts. A tied head is the embedding once more: it is held twice, cut differently."""
    vocab, hidden = config.vocab_size, config.hidden_size
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield TensorSpec(name="model.embed_tokens.weight", shape=(vocab, hidden), kind="embedding and head")
    yield TensorSpec(name=head, shape=(vocab, hidden), kind="embedding and head", cut="head")
    yield _norm("model.norm.weight", hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield _norm(f"{prefix}.input_layernorm.weight", hidden)
        yield _norm(f"{prefix}.post_attention_layernorm.weight", hidden)
        yield from _attention(config, f"{prefix}.self_attn")
        if layer in config.sparse_layers:
            yield from _sparse(config, f"{prefix}.mlp")
        else:
            yield from _mlp(f"{prefix}.mlp", hidden, config.intermediate_size, "dense layers", "dense")


def expert_tensors(config: ModelConfig, layer: int, expert: int) -> Iterator[TensorSpec]:
    """The three matrices of a routed expert."""
    prefix = f"model.layers.{layer}.mlp.experts.{expert}"
    yield from _mlp(prefix, config.hidden_size, config.moe_intermediate_size, "routed experts", "expert")


def _attention(config: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    hidden, latent, heads = config.hidden_size, config.kv_lora_rank, config.num_attention_heads
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.q_lora_rank is None:
        yield _projection(f"{prefix}.q_proj.weight", queries, hidden, "attention")
    else:
        yield _projection(f"{prefix}.q_a_proj.weight", config.q_lora_rank, hidden, "whole")
        yield _norm(f"{prefix}.q_a_layernorm.weight", config.q_lora_rank)
        yield _projection(f"{prefix}.q_b_proj.weight", queries, config.q_lora_rank, "attention")
    yield _projection(f"{prefix}.kv_a_proj_with_mqa.weight", config.latent_dim, hidden, "whole")
    yield _norm(f"{prefix}.kv_a_layernorm.weight", latent)
    kv_rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield replace(_projection(f"{prefix}.kv_b_proj.weight", kv_rows, latent, "attention"), absorbed=True)
    yield _projection(f"{prefix}.o_proj.weight", hidden, heads * config.v_head_dim, "attention", dim=1)


def _sparse(config: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    """The gate and the shared expert; routed experts are `expert_tensors`."""
    experts, hidden = config.n_routed_experts, config.hidden_size
    yield TensorSpec(name=f"{prefix}.gate.weight", shape=(experts, hidden), kind="gates and norms", fp32=True)
    yield TensorSpec(name=f"{prefix}.gate.e_score_correction_bias", shape=(experts,), kind="gates and norms", fp32=True)
    if config.n_shared_experts:
        width = config.moe_intermediate_size * config.n_shared_experts
        yield from _mlp(f"{prefix}.shared_experts", hidden, width, "shared experts", "shared")


def _mlp(prefix: str, hidden: int, width: int, kind: Kind, cut: Cut) -> Iterator[TensorSpec]:
    for name in ("gate_proj", "up_proj"):
        yield TensorSpec(name=f"{prefix}.{name}.weight", shape=(width, hidden), kind=kind, cut=cut, blocks=True)
    yield TensorSpec(name=f"{prefix}.down_proj.weight", shape=(hidden, width), kind=kind, cut=cut, dim=1, blocks=True)


def _projection(name: str, rows: int, columns: int, cut: Cut, dim: int = 0) -> TensorSpec:
    return TensorSpec(name=name, shape=(rows, columns), kind="attention", cut=cut, dim=dim, blocks=True)


def _norm(name: str, size: int) -> TensorSpec:
    return TensorSpec(name=name, shape=(size,), kind="gates and norms")
