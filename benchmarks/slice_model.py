"""One rank's DeepSeek-V3 with dummy weights made where they stay: matrices in FP8 blocks, the engine's own layers around them.

Everything that runs is the library's: embedding, MLA, gate, replica choice, experts' schedule, two-batch orders, head. What differs
from a served model: weights are random, and the dispatcher is the loopback one. As in the engine on a GPU, the halves of kv_b_proj,
norms, gate, embedding and head are not in FP8, and all other matrices are.
"""

from __future__ import annotations

from dataclasses import dataclass

import bare_import  # noqa: F401  before anything of moesaic
import torch
from slice_dispatcher import LoopbackDispatcher, LoopbackGroup
from torch import Tensor

from moesaic.attention.backend import AttentionBackend, make_backend
from moesaic.attention.config import MLAConfig
from moesaic.attention.dp_attention import AttentionTPGroup
from moesaic.attention.mla import MLAWeights, MultiHeadLatentAttention
from moesaic.eplb.location import ExpertLocation
from moesaic.eplb.replica_choice import ReplicaChoice, make_replica_choice
from moesaic.kernels.gemm import BlockWeight
from moesaic.kernels.grouped_backends import Name
from moesaic.kernels.quant import BLOCK, FP8
from moesaic.kernels.rope import rope_table
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.models.deepseek_v3 import DeepseekV3, Head
from moesaic.launch.models.layers import DenseDecoderLayer, LayerParts, SparseDecoderLayer
from moesaic.launch.models.parallel import ParallelContext
from moesaic.moe.communication import Communications
from moesaic.moe.config import GateConfig
from moesaic.moe.device_experts import make_expert_runner
from moesaic.moe.experts import ExpertWeights
from moesaic.moe.gate import Gate
from moesaic.moe.layer import DenseMLP, SparseLayer


@dataclass(frozen=True, kw_only=True)
class SparseWeights:
    """gate fp32 [E, H]; the experts of this rank's slots; the shared expert (None where a model has none)."""

    gate: Tensor
    experts: ExpertWeights
    shared: DenseMLP | None


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """norm: ones [H], for both norms of the layer. Either `dense` or `sparse`."""

    norm: Tensor
    attention: MLAWeights
    dense: DenseMLP | None
    sparse: SparseWeights | None


@dataclass(frozen=True, kw_only=True)
class SliceWeights:
    """All that one rank holds."""

    embedding: Tensor
    layers: list[LayerWeights]
    head: Tensor
    rope: Tensor


class WeightMaker:
    """Random weights of `dtype` and in FP8 on `device`; a matrix [.., N, K] has elements of about K ** -0.5.

    `chance`: None for torch's own generator. `fp8_gemm` computes with the dense FP8 weights.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, chance: torch.Generator | None, *, fp8_gemm: Name
    ) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self._chance = chance
        self._fp8_gemm = fp8_gemm

    def make(self, *, num_slots: int, max_positions: int) -> SliceWeights:
        """num_slots: routed experts of one layer on this rank."""
        config = self._config
        return SliceWeights(
            embedding=self._plain(config.vocab_size, config.hidden_size),
            layers=[self._layer(index, num_slots) for index in range(config.num_hidden_layers)],
            head=self._plain(config.vocab_size, config.hidden_size),
            rope=rope_table(config.rope, max_positions).to(self._device),
        )

    def _layer(self, index: int, num_slots: int) -> LayerWeights:
        config = self._config
        is_dense = index < config.first_k_dense_replace
        return LayerWeights(
            norm=self._ones(config.hidden_size),
            attention=self._attention(),
            dense=self._mlp(config.intermediate_size) if is_dense else None,
            sparse=None if is_dense else self._sparse(num_slots),
        )

    def _attention(self) -> MLAWeights:
        config = self._config
        assert config.q_lora_rank is not None, "DeepSeek-V3 has a query latent"
        heads, query_width = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
        return MLAWeights(
            down=self._blocks(config.q_lora_rank + config.latent_dim, config.hidden_size),
            q_norm=self._ones(config.q_lora_rank),
            q_up=self._blocks(heads * query_width, config.q_lora_rank),
            kv_norm=self._ones(config.kv_lora_rank),
            kv_up_key=self._plain(heads, config.qk_nope_head_dim, config.kv_lora_rank),
            kv_up_value=self._plain(heads, config.v_head_dim, config.kv_lora_rank),
            output=self._blocks(config.hidden_size, heads * config.v_head_dim),
        )

    def _sparse(self, num_slots: int) -> SparseWeights:
        config = self._config
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        gate_up, gate_up_scales = self._fp8(num_slots, 2 * inner, hidden)
        down, down_scales = self._fp8(num_slots, hidden, inner)
        return SparseWeights(
            gate=self._plain(config.n_routed_experts, hidden).float(),
            experts=ExpertWeights(gate_up=gate_up, gate_up_scales=gate_up_scales, down=down, down_scales=down_scales),
            shared=self._mlp(inner * config.n_shared_experts) if config.n_shared_experts else None,
        )

    def _mlp(self, width: int) -> DenseMLP:
        hidden = self._config.hidden_size
        return DenseMLP(gate_up=self._blocks(2 * width, hidden), down=self._blocks(hidden, width))

    def _blocks(self, rows: int, columns: int) -> BlockWeight:
        values, scales = self._fp8(1, rows, columns)
        return BlockWeight(values=values[0], scales=scales[0], backends=(self._fp8_gemm,))

    def _fp8(self, count: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Values [count, rows, columns] of about 1, and equal scales: which values they are takes no time."""
        shape = count, -(-rows // BLOCK), -(-columns // BLOCK)
        values = torch.empty(count, rows, columns, dtype=FP8, device=self._device)
        for each in values:  # one after the other: the random numbers take twice the room
            each.copy_(self._normal(rows, columns))
        return values, torch.full(shape, columns**-0.5, device=self._device)

    def _plain(self, *shape: int) -> Tensor:
        return self._normal(*shape).mul_(shape[-1] ** -0.5)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._chance, dtype=self._dtype, device=self._device)

    def _ones(self, size: int) -> Tensor:
        return torch.ones(size, dtype=self._dtype, device=self._device)


def build_slice(config: ModelConfig, weights: SliceWeights, group: LoopbackGroup, *, num_layers: int | None = None) -> DeepseekV3:
    """The model of one rank of `group.place`, or the first `num_layers` layers of it. Weights are shared, not copied."""
    communications = Communications()
    alone = AttentionTPGroup(0, 1, None, communications)
    replicas = _replicas(config, group)
    maker = _Layers(config, weights, group, alone, communications, make_backend(), replicas)
    return DeepseekV3(
        embedding=weights.embedding,
        layers=[maker.layer(index) for index in range(num_layers or config.num_hidden_layers)],
        final_norm=weights.layers[0].norm,
        eps=config.rms_norm_eps,
        head=Head(weight=weights.head, over_world=False),
        parallel=ParallelContext(),
        group=alone,
        experts=[],
        replicas=replicas,
        communications=communications,
        single_batch_overlap=False,
    )


def _replicas(config: ModelConfig, group: LoopbackGroup) -> ReplicaChoice | None:
    """Experts to slots, as rank 0 would: a table lookup."""
    place = group.place
    if place.num_slots == config.n_routed_experts:
        return None
    location = ExpertLocation.trivial(
        num_layers=len(config.sparse_layers),
        num_experts=config.n_routed_experts,
        num_slots=place.num_slots,
        ep_size=place.ep_size,
    )
    return make_replica_choice("static", location, rank=0, device=group.device)


@dataclass(frozen=True)
class _Layers:
    """What the layers of one model have in common."""

    config: ModelConfig
    weights: SliceWeights
    group: LoopbackGroup
    alone: AttentionTPGroup
    communications: Communications
    backend: AttentionBackend
    replicas: ReplicaChoice | None

    def layer(self, index: int) -> DenseDecoderLayer | SparseDecoderLayer:
        config, own = self.config, self.weights.layers[index]
        parts = LayerParts(
            index=index,
            input_norm=own.norm,
            post_norm=own.norm,
            eps=config.rms_norm_eps,
            attention=MultiHeadLatentAttention(self._mla(), own.attention, index, self.weights.rope),
            backend=self.backend,
            group=self.alone,
        )
        if own.dense is not None:
            return DenseDecoderLayer(parts, own.dense, split=False)
        assert own.sparse is not None, "a layer is dense or sparse"
        return SparseDecoderLayer(parts, self._moe(index - config.first_k_dense_replace, own.sparse), scatter=False)

    def _mla(self) -> MLAConfig:
        config = self.config
        return MLAConfig(
            num_heads=config.num_attention_heads,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            kv_lora_rank=config.kv_lora_rank,
            softmax_scale=config.softmax_scale,
            rms_norm_eps=config.rms_norm_eps,
        )

    def _moe(self, index: int, sparse: SparseWeights) -> SparseLayer:
        place = self.group.place
        return SparseLayer(
            index=index,
            num_slots=place.num_slots,
            gate=self._gate(sparse.gate),
            replicas=self.replicas,
            replicas_communicate=False,
            dispatcher=LoopbackDispatcher(self.group, index, self.communications),
            experts=make_expert_runner((self.group.runner,), sparse.experts, dtype=self.weights.embedding.dtype),
            shared_expert=sparse.shared,
        )

    def _gate(self, weight: Tensor) -> Gate:
        config = self.config
        gate = GateConfig(
            num_experts=config.n_routed_experts,
            topk=config.num_experts_per_tok,
            num_groups=config.n_group,
            topk_groups=config.topk_group,
            normalize=config.norm_topk_prob,
            scaling_factor=config.routed_scaling_factor,
        )
        return Gate(gate, weight, torch.zeros(config.n_routed_experts, device=weight.device))
