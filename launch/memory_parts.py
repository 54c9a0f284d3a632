"""What a rank's memory holds, part by part, as pure functions of the model's numbers, the layout and the settled flags.

Weights and KV are exact (tests compare them with what is loaded); activations and graphs are estimates, each with its basis in
words. Knows no device and reads nothing. All ranks of a layout hold equally much. Bytes everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moesaic.attention.config import MAX_GROUP_TOKENS
from moesaic.launch.config import ResolvedConfig
from moesaic.launch.dispatch_limits import tokens_cap_per_dp
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.models.tensors import FP8_BLOCK, KINDS, Cut, Kind, TensorSpec, expert_tensors, tensors_without_experts
from moesaic.launch.topology import Topology

DEFAULT_HOST_KV_GB = 4.0
"""Host memory of a decode rank for the KV of retracted requests, if no flag says it."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
SCALE_BYTES = 4
SKEW = 2
"""How many times its fair share of a step's tokens the estimate lets one rank receive in the normal mode."""
GRAPH_BYTES_PER_LAYER = 256 << 10
"""What one captured graph is taken to need for each layer besides its tensors: about 25 kernels' nodes and their copies."""


@dataclass(frozen=True, kw_only=True)
class MemoryItem:
    """`basis`: where the number comes from, in words."""

    name: str
    num_bytes: int
    basis: str


BufferSizes = Callable[[ResolvedConfig, Topology], tuple[MemoryItem, ...]]


def no_buffers(config: ResolvedConfig, topology: Topology) -> tuple[MemoryItem, ...]:
    """Of backends that keep no buffers of their own between steps: `none` and `torch`."""
    return ()


@dataclass(frozen=True, kw_only=True)
class MemoryInputs:
    """`num_slots`: expert slots of a layer, on all ranks. `experts_move`: weights are exchanged while serving.

    `fp8`: kinds whose FP8 matrices stay as stored, with their scales, rather than in `config.dtype` (kv_b_proj never does; routed
    experts are filled up to whole blocks); `fp8_fits`: sizes and layout allow it. `communication`: the buffers that the all-to-all
    backend keeps. `graph_batch_sizes`: tokens per rank of the graphs that are captured. `host_kv_gb`: the most host memory for the
    KV of retracted requests, in 1e9 bytes; None: the default, or half of what there is.
    """

    model: ModelConfig
    topology: Topology
    config: ResolvedConfig
    num_slots: int
    experts_move: bool = False
    fp8: frozenset[Kind] = frozenset()
    fp8_fits: bool = True
    communication: BufferSizes = no_buffers
    graph_batch_sizes: tuple[int, ...] = ()
    host_kv_gb: float | None = 0.0

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.config.dtype]

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.topology.ep_size


def weight_bytes(inputs: MemoryInputs) -> Mapping[Kind, int]:
    """What one rank's weights take, by kind."""
    model, parts = inputs.model, _parts(inputs)
    total = dict.fromkeys(KINDS, 0)
    for spec in tensors_without_experts(model):
        total[spec.kind] += _tensor_bytes(inputs, spec, parts[spec.cut])
    total["routed experts"] = len(model.sparse_layers) * inputs.slots_per_rank * expert_bytes(inputs)
    return total


def expert_bytes(inputs: MemoryInputs) -> int:
    """One routed expert's weights, or this rank's part of them."""
    parts = _parts(inputs)
    return sum(_tensor_bytes(inputs, spec, parts[spec.cut]) for spec in expert_tensors(inputs.model, 0, 0))


def kv_bytes_per_token(inputs: MemoryInputs) -> int:
    """Exactly (kv_lora_rank + rope) elements per layer."""
    return inputs.model.num_hidden_layers * inputs.model.latent_dim * DTYPE_BYTES[inputs.config.kv_dtype]


def rope_table_bytes(inputs: MemoryInputs) -> int:
    """complex64 [context_length, rope / 2]."""
    return inputs.config.context_length * inputs.model.qk_rope_head_dim * 4


def staging_bytes(inputs: MemoryInputs) -> int:
    """A rebalance moves layer by layer: at most every slot of one layer is received anew."""
    return inputs.slots_per_rank * expert_bytes(inputs) if inputs.experts_move and inputs.model.sparse_layers else 0


def window_bytes(inputs: MemoryInputs) -> int:
    """The windows of backend `symm`, which other ranks write into; 0 for another backend."""
    if inputs.config.moe_a2a_backend != "symm":
        return 0
    # Here alone, as both need torch, and whoever asks for this backend has imported it to find the GPUs.
    import torch

    from moesaic.kernels.peer_exchange import PeerLayout
    from moesaic.moe.symm_windows import NUM_WINDOWS

    layout = PeerLayout(
        num_ranks=inputs.topology.ep_size,
        num_local=inputs.slots_per_rank,
        max_tokens=inputs.config.max_dispatch_tokens_per_rank,
        topk=inputs.model.num_experts_per_tok,
        hidden=inputs.model.hidden_size,
        dtype=getattr(torch, inputs.config.dtype),
    )
    return NUM_WINDOWS * layout.num_bytes


def step_tokens(inputs: MemoryInputs) -> int:
    """Rows of the largest step of one DP rank: all running requests and a full chunk, within what low-latency takes."""
    config = inputs.config
    tokens = config.max_running_requests_per_dp + config.chunked_prefill_tokens_per_dp
    if config.dispatch_mode == "low_latency":
        tokens = min(tokens, tokens_cap_per_dp(config.max_dispatch_tokens_per_rank, config.moe_a2a_backend, inputs.topology))
    return tokens


def activation_item(inputs: MemoryInputs) -> MemoryItem:
    """The largest step: what lives through it, and the largest of its phases."""
    tokens = step_tokens(inputs)
    phases = {
        f"attention over {_context_tokens(inputs):,} tokens of context": attention_bytes(inputs, tokens, _context_tokens(inputs)),
        "dispatch, experts and combine": moe_bytes(inputs, tokens),
        f"logits of {inputs.config.max_running_requests_per_dp:,} requests": logits_bytes(inputs),
    }
    largest = max(phases, key=lambda phase: phases[phase])
    residual = 3 * tokens * inputs.model.hidden_size * inputs.element_bytes
    return MemoryItem(
        name="activations of the largest step",
        num_bytes=residual + phases[largest],
        basis=f"estimate: {tokens:,} tokens per DP rank; most in {largest}",
    )


def attention_bytes(inputs: MemoryInputs, tokens: int, context_tokens: int) -> int:
    """Queries (twice: one copy is contiguous) and outputs of the rows, keys and values expanded from the latent context."""
    model = inputs.model
    heads = model.num_attention_heads // inputs.topology.attn_tp_size
    query_dim = model.qk_nope_head_dim + model.qk_rope_head_dim
    rows = tokens * (heads * (2 * query_dim + model.v_head_dim) + (model.q_lora_rank or 0) + model.latent_dim)
    context = context_tokens * (heads * (model.qk_nope_head_dim + model.v_head_dim) + 2 * model.latent_dim)
    return (rows + context) * inputs.element_bytes


def moe_bytes(inputs: MemoryInputs, tokens: int) -> int:
    """What is sent, received, laid out for the experts, between their products, and returned."""
    model, topology, config = inputs.model, inputs.topology, inputs.config
    own = -(-tokens // topology.attn_tp_size) if config.moe_a2a_backend != "none" else tokens
    sources = topology.world_size if config.moe_a2a_backend != "none" else topology.dp_size
    choices = own * sources * model.num_experts_per_tok
    rows = 0
    if config.dispatch_mode != "low_latency":
        rows = min(SKEW * -(-choices // topology.ep_size), choices)
    if config.dispatch_mode != "normal":
        rows = max(rows, inputs.slots_per_rank * sources * min(own, config.max_dispatch_tokens_per_rank))
    received = min(own * sources, rows)
    sent = own * min(model.num_experts_per_tok, topology.ep_size)
    inner = 3 * (model.moe_intermediate_size // topology.moe_tp_size)
    return ((2 * sent + 2 * received + 2 * rows) * model.hidden_size + rows * inner) * inputs.element_bytes


def logits_bytes(inputs: MemoryInputs) -> int:
    """fp32 logits of all running requests, twice (the sampler changes a copy), and the part that this rank's head computes."""
    model, topology, rows = inputs.model, inputs.topology, inputs.config.max_running_requests_per_dp
    parts = _parts(inputs)["head"]
    headed = rows * topology.dp_size if parts > topology.attn_tp_size else rows
    own = headed * (model.hidden_size + model.vocab_size // parts) * inputs.element_bytes
    return 2 * rows * model.vocab_size * 4 + own


def graph_item(inputs: MemoryInputs) -> MemoryItem:
    """CUDA graphs of all sizes share one pool, so the largest size counts, and each graph's own nodes."""
    sizes = inputs.graph_batch_sizes
    if not sizes:
        return MemoryItem(name="CUDA graphs", num_bytes=0, basis="none are captured")
    pool = attention_bytes(inputs, max(sizes), 0) + moe_bytes(inputs, max(sizes))
    nodes = len(sizes) * inputs.model.num_hidden_layers * GRAPH_BYTES_PER_LAYER
    basis = (
        f"estimate: one pool for {len(sizes)} sizes up to {max(sizes)} tokens, {GRAPH_BYTES_PER_LAYER >> 10} KiB a layer and size"
    )
    return MemoryItem(name="CUDA graphs", num_bytes=pool + nodes, basis=basis)


def _context_tokens(inputs: MemoryInputs) -> int:
    """Tokens whose keys and values are expanded at once: a group of short contexts, or one long one."""
    return max(MAX_GROUP_TOKENS, inputs.config.context_length)


def _parts(inputs: MemoryInputs) -> Mapping[Cut, int]:
    """Into how many equal parts each kind of tensor is cut; as `launch/models/build.py` cuts them."""
    topology, config = inputs.topology, inputs.config
    scatters = config.moe_a2a_backend != "none"
    over_world = not config.enable_dp_lm_head and topology.dp_size > 1
    return {
        "whole": 1,
        "attention": topology.attn_tp_size,
        "dense": topology.moe_dense_tp_size,
        "shared": 1 if scatters else topology.attn_tp_size,
        "expert": topology.moe_tp_size,
        "head": topology.world_size if over_world else topology.attn_tp_size,
    }


def _tensor_bytes(inputs: MemoryInputs, spec: TensorSpec, parts: int) -> int:
    shape = spec.part(parts)
    if spec.fp32:
        return math.prod(shape) * 4
    if spec.blocks and not spec.absorbed and spec.kind in inputs.fp8:
        if spec.cut == "expert":
            shape = tuple(-(-size // FP8_BLOCK) * FP8_BLOCK if dim == spec.dim else size for dim, size in enumerate(shape))
        return math.prod(shape) + math.prod(-(-size // FP8_BLOCK) for size in shape) * SCALE_BYTES
    return math.prod(shape) * inputs.element_bytes
