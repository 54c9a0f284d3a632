"""Puts a DeepSeek-V3 together for one rank: pulls its weights by checkpoint name and hands them to the libraries' layers."""

from __future__ import annotations

import torch

from moesaic.attention.backend import AttentionBackend
from moesaic.attention.config import MLAConfig
from moesaic.attention.dp_attention import AttentionTPGroup
from moesaic.attention.mla import MLAWeights, MultiHeadLatentAttention
from moesaic.kernels.rope import rope_table
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.models.deepseek_v3 import DeepseekV3, Head
from moesaic.launch.models.dispatchers import Dispatchers
from moesaic.launch.models.expert_loader import ExpertLoader
from moesaic.launch.models.expert_slots import choose_replicas, expert_location, replicas_communicate
from moesaic.launch.models.layers import DenseDecoderLayer, LayerParts, SparseDecoderLayer
from moesaic.launch.models.matrix_loader import MatrixLoader, Part, out_fastest
from moesaic.launch.models.options import BuildOptions
from moesaic.launch.models.parallel import ParallelContext
from moesaic.launch.models.weights import Shard, WeightSource
from moesaic.moe.communication import Communications
from moesaic.moe.config import ExpertPlacement, GateConfig
from moesaic.moe.device_experts import make_expert_runner
from moesaic.moe.experts import ExpertWeights
from moesaic.moe.gate import Gate
from moesaic.moe.layer import DenseMLP, SparseLayer


class DeepseekV3Builder:
    """Builds one rank's model. Tensors are asked for by the names of the released checkpoints."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        parallel: ParallelContext,
        backend: AttentionBackend,
        options: BuildOptions,
    ) -> None:
        self._config = config
        self._source = source
        self._parallel = parallel
        self._backend = backend
        self._options = options
        self._communications = Communications()
        self._group = AttentionTPGroup(parallel.attn_tp_rank, parallel.attn_tp_size, parallel.attn_tp_group, self._communications)
        self._location = expert_location(config, parallel, options.slots)
        self._replicas = choose_replicas(self._location, parallel, options.slots, options.device, self._communications)
        self._experts: list[ExpertWeights] = []
        self._dispatchers = Dispatchers(config, parallel, options, self._location.num_slots, self._communications)
        fp8 = options.fp8_gemm_backends if options.fp8_weights else ()
        self._load = MatrixLoader(source, dtype=options.dtype, device=options.device, fp8_backends=fp8)
        self._rope_table = rope_table(config.rope, options.max_positions).to(options.device)

    def build(self) -> DeepseekV3:
        """Raises CheckpointError for a tensor that is missing or doesn't fit."""
        config = self._config
        embedding = self._load.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        return DeepseekV3(
            embedding=embedding,
            layers=[self._layer(index) for index in range(config.num_hidden_layers)],
            final_norm=self._load.tensor("model.norm.weight", config.hidden_size),
            eps=config.rms_norm_eps,
            head=self._head(),
            parallel=self._parallel,
            group=self._group,
            experts=self._experts,
            replicas=self._replicas,
            communications=self._communications,
            single_batch_overlap=self._options.single_batch_overlap,
            exchange=self._dispatchers.exchange,
        )

    def _layer(self, index: int) -> DenseDecoderLayer | SparseDecoderLayer:
        config = self._config
        prefix = f"model.layers.{index}"
        parts = LayerParts(
            index=index,
            input_norm=self._load.tensor(f"{prefix}.input_layernorm.weight", config.hidden_size),
            post_norm=self._load.tensor(f"{prefix}.post_attention_layernorm.weight", config.hidden_size),
            eps=config.rms_norm_eps,
            attention=self._attention(index),
            backend=self._backend,
            group=self._group,
        )
        if index < config.first_k_dense_replace:
            split = self._parallel.dense_tp and self._parallel.attn_tp_size > 1
            mlp = self._mlp(f"{prefix}.mlp", config.intermediate_size, split=split)
            return DenseDecoderLayer(parts, mlp, split=split)
        return SparseDecoderLayer(
            parts,
            self._moe(f"{prefix}.mlp", index - config.first_k_dense_replace),
            scatter=self._parallel.scatters_tokens,
        )

    def _attention(self, index: int) -> MultiHeadLatentAttention:
        config, parallel = self._config, self._parallel
        prefix = f"model.layers.{index}.self_attn"
        heads = Shard(0, parallel.attn_tp_rank, parallel.attn_tp_size)
        hidden, latent = config.hidden_size, config.kv_lora_rank
        query_rows = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        value_rows = config.num_attention_heads * config.v_head_dim
        kv_down: Part = (f"{prefix}.kv_a_proj_with_mqa.weight", (config.latent_dim, hidden), None)
        q_norm = q_up = None
        if config.q_lora_rank is None:
            down = self._load.matrix((f"{prefix}.q_proj.weight", (query_rows, hidden), heads), kv_down)
        else:
            down = self._load.matrix((f"{prefix}.q_a_proj.weight", (config.q_lora_rank, hidden), None), kv_down)
            q_norm = self._load.tensor(f"{prefix}.q_a_layernorm.weight", config.q_lora_rank)
            q_up = self._load.matrix((f"{prefix}.q_b_proj.weight", (query_rows, config.q_lora_rank), heads))
        kv_up_rows = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        kv_up = self._load.tensor(f"{prefix}.kv_b_proj.weight", kv_up_rows, latent, shard=heads)
        per_head = kv_up.view(-1, config.qk_nope_head_dim + config.v_head_dim, latent)
        key, value = torch.split(per_head, [config.qk_nope_head_dim, config.v_head_dim], dim=1)
        weights = MLAWeights(
            down=down,
            q_norm=q_norm,
            q_up=q_up,
            kv_norm=self._load.tensor(f"{prefix}.kv_a_layernorm.weight", latent),
            # A copy in any case: of a single head it would be a view that keeps the values' half alive.
            kv_up_key=key.clone(memory_format=torch.contiguous_format),
            kv_up_value=out_fastest(value.flatten(0, 1)).view(value.shape),
            output=self._load.matrix((f"{prefix}.o_proj.weight", (hidden, value_rows), Shard(1, heads.index, heads.count))),
        )
        return MultiHeadLatentAttention(self._mla_config(), weights, index, self._rope_table)

    def _mla_config(self) -> MLAConfig:
        config = self._config
        return MLAConfig(
            num_heads=config.num_attention_heads // self._parallel.attn_tp_size,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            kv_lora_rank=config.kv_lora_rank,
            softmax_scale=config.softmax_scale,
            rms_norm_eps=config.rms_norm_eps,
            fp8_activations=self._options.fp8_activations,
        )

    def _mlp(self, prefix: str, width: int, *, split: bool) -> DenseMLP:
        """A feed-forward of `width`, or this attention-TP rank's part of it."""
        hidden = self._config.hidden_size
        index, count = (self._parallel.attn_tp_rank, self._parallel.attn_tp_size) if split else (0, 1)
        rows, columns = Shard(0, index, count), Shard(1, index, count)
        gate: Part = (f"{prefix}.gate_proj.weight", (width, hidden), rows)
        up: Part = (f"{prefix}.up_proj.weight", (width, hidden), rows)
        return DenseMLP(
            gate_up=self._load.matrix(gate, up),
            down=self._load.matrix((f"{prefix}.down_proj.weight", (hidden, width), columns)),
            fp8_activations=self._options.fp8_activations,
        )

    def _moe(self, prefix: str, sparse_index: int) -> SparseLayer:
        config = self._config
        gate = Gate(
            GateConfig(
                num_experts=config.n_routed_experts,
                topk=config.num_experts_per_tok,
                num_groups=config.n_group,
                topk_groups=config.topk_group,
                normalize=config.norm_topk_prob,
                scaling_factor=config.routed_scaling_factor,
            ),
            self._load.tensor(f"{prefix}.gate.weight", config.n_routed_experts, config.hidden_size, dtype=torch.float32),
            self._load.tensor(f"{prefix}.gate.e_score_correction_bias", config.n_routed_experts, dtype=torch.float32),
        )
        shared = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            split = self._parallel.attn_tp_size > 1 and not self._parallel.scatters_tokens
            shared = self._mlp(f"{prefix}.shared_experts", width, split=split)
        placement = ExpertPlacement(
            num_slots=self._location.num_slots, ep_size=self._parallel.ep_size, ep_rank=self._parallel.ep_rank
        )
        held = self._location.physical_to_logical[sparse_index, placement.first : placement.first + placement.num_local].tolist()
        options = self._options
        load = ExpertLoader(config, self._source, self._parallel, dtype=options.dtype, device=options.device)
        experts = load.fp8(prefix, held) if options.fp8_weights else load.plain(prefix, held, out_fastest=options.for_torch)
        self._experts.append(experts)
        return SparseLayer(
            index=sparse_index,
            num_slots=self._location.num_slots,
            gate=gate,
            replicas=self._replicas,
            replicas_communicate=self._replicas is not None and replicas_communicate(self._parallel, self._options.slots),
            dispatcher=self._dispatchers.make(placement),
            experts=make_expert_runner(
                self._options.expert_backends,
                experts,
                dtype=self._options.dtype,
                fp8_activations=self._options.fp8_activations,
            ),
            shared_expert=shared,
        )

    def _head(self) -> Head:
        config, parallel = self._config, self._parallel
        over_world = not parallel.dp_lm_head and parallel.dp_size > 1
        index, count = (parallel.rank, parallel.world_size) if over_world else (parallel.attn_tp_rank, parallel.attn_tp_size)
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        weight = self._load.tensor(name, config.vocab_size, config.hidden_size, shard=Shard(0, index, count))
        return Head(weight=weight, over_world=over_world)
