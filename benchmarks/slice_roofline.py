"""The bytes that one rank's step must move and the operations it must do, operation by operation. Pure: shapes in, numbers out.

Counted are matrix products and attention (2 operations per multiply-add; causal prefill counts the pairs that are seen), weights
read once, every product's input read (in FP8 by FP8 products) and output written once, the KV read and written, and what normal
mode moves around the experts. Low-latency mode's own bytes belong to the communication. The floor of an operation is the longer of
its bytes at the copy bandwidth and its operations at the rates of their kinds; the floor of a step is the sum, so no operation
hides under another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import bare_import  # noqa: F401  before anything of moesaic

from moesaic.launch.models.config import ModelConfig

Kind = Literal["fp8", "bf16", "fp32"]
Group = Literal["attention", "gate", "dispatch", "experts", "combine", "shared", "dense", "head"]

GROUPS: dict[Group, tuple[str, ...]] = {
    "attention": ("attention_prepare", "attention_core"),
    "gate": ("gate",),
    "dispatch": ("dispatch_a", "dispatch_b"),
    "experts": ("experts",),
    "combine": ("combine_a", "combine_b"),
    "shared": ("shared_expert", "output"),
    "dense": ("feed_forward",),
    "head": ("embed", "head"),
}
"""What the report calls them -> the model's operations."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's step. num_rows of its experts, num_received tokens they belong to (normal mode). num_pairs: (query, key) pairs of
    one layer that attention looks at; num_context: tokens of KV that a layer reads. num_logits rows of the head.
    """

    decode: bool
    num_tokens: int
    num_pairs: int
    num_context: int
    num_logits: int
    num_local: int
    num_rows: int
    num_received: int
    activation_bytes: int = 2


@dataclass(kw_only=True)
class Work:
    """Bytes, and operations by kind."""

    num_bytes: float = 0.0
    flops: dict[Kind, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: Work, times: int = 1) -> None:
        self.num_bytes += times * other.num_bytes
        for kind, flops in other.flops.items():
            self.flops[kind] += times * flops

    @property
    def num_flops(self) -> float:
        return sum(self.flops.values())


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Bytes per second of a copy, operations per second by kind, and where the numbers come from."""

    name: str
    copy: float
    rates: dict[Kind, float]
    source: str

    def seconds(self, work: Work) -> float:
        """The floor of one operation."""
        return max(work.num_bytes / self.copy, self.compute_s(work))

    def is_memory_bound(self, work: Work) -> bool:
        return work.num_bytes / self.copy >= self.compute_s(work)

    def compute_s(self, work: Work) -> float:
        return sum(flops / self.rates[kind] for kind, flops in work.flops.items())


H200 = Machine(
    name="H200",
    copy=4.3e12,
    rates={"fp8": 1580e12, "bf16": 790e12, "fp32": 60e12},
    source="copy and bf16 measured on one H200 (HOPPER.md); FP8 taken as twice bf16; fp32 near the 67 TFLOP/s of the data sheet",
)
BANDWIDTH_H100_OVER_H200 = 3.35 / 4.8
"""Of NVIDIA's data sheets (SXM); their operations per second are the same."""


def step_work(config: ModelConfig, share: Share) -> dict[Group, Work]:
    """All layers' work of one step, by group."""
    num_sparse = len(config.sparse_layers)
    num_dense = config.num_hidden_layers - num_sparse
    totals: dict[Group, Work] = {group: Work() for group in GROUPS}
    for part in _attention(config, share):
        totals["attention"].add(part, config.num_hidden_layers)
    totals["dense"].add(_mlp(config, share, config.intermediate_size), num_dense)
    totals["gate"].add(_product(share, config.hidden_size, config.n_routed_experts, "fp32", 4), num_sparse)
    totals["experts"].add(_experts(config, share), num_sparse)
    if config.n_shared_experts:
        totals["shared"].add(_mlp(config, share, config.moe_intermediate_size * config.n_shared_experts), num_sparse)
    totals["shared"].add(_moved(share, 3 * config.hidden_size), num_sparse)  # the sum of shared and combined
    if not share.decode:
        dispatch, combine = _around_experts(config, share)
        totals["dispatch"].add(dispatch, num_sparse)
        totals["combine"].add(combine, num_sparse)
    totals["head"].add(_moved(share, 2 * config.hidden_size))
    totals["head"].add(_head(config, share))
    return totals


def floor_s(work: dict[Group, Work], machine: Machine) -> float:
    return sum(machine.seconds(each) for each in work.values())


def _attention(config: ModelConfig, share: Share) -> Iterator[Work]:
    heads, latent, width = config.num_attention_heads, config.kv_lora_rank, config.latent_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    query = nope + config.qk_rope_head_dim
    assert config.q_lora_rank is not None, "DeepSeek-V3 has a query latent"
    yield _moved(share, 7 * config.hidden_size + 2 * width)  # two norms with residuals, one's result in FP8; the KV write
    yield Work(num_bytes=share.num_tokens * fp8_row_bytes(config.hidden_size))
    yield _product(share, config.hidden_size, config.q_lora_rank + width, "fp8", 1)
    yield _product(share, config.q_lora_rank, heads * query, "fp8", 1)
    yield _product(share, heads * value, config.hidden_size, "fp8", 1)
    kv_up_bytes = heads * (nope + value) * latent * share.activation_bytes
    if share.decode:
        yield _bf16(2 * share.num_tokens * heads * (nope + value) * latent, kv_up_bytes)
        yield _moved(share, heads * (2 * (query + value) + 2 * (width + latent)))
        yield _bf16(2 * share.num_pairs * heads * (width + latent), share.num_context * width * share.activation_bytes)
    else:
        expanded = share.num_context * heads * (nope + value)
        yield _bf16(2 * expanded * latent, kv_up_bytes + (2 * expanded + share.num_context * width) * share.activation_bytes)
        yield _bf16(2 * share.num_pairs * heads * (query + value), 0)
        yield _moved(share, heads * (query + value))


def _experts(config: ModelConfig, share: Share) -> Work:
    hidden, inner, rows = config.hidden_size, config.moe_intermediate_size, share.num_rows
    weights = share.num_local * expert_bytes(hidden, inner)
    moved = rows * (hidden + 2 * inner * share.activation_bytes + inner + hidden * share.activation_bytes)
    return Work(num_bytes=weights + moved, flops={"fp8": 2 * rows * 3 * hidden * inner})


def _around_experts(config: ModelConfig, share: Share) -> tuple[Work, Work]:
    """Normal mode: quantise and arrange; weighted sums of the received tokens."""
    hidden, rows, received, size = config.hidden_size, share.num_rows, share.num_received, share.activation_bytes
    dispatch = Work(num_bytes=hidden * (share.num_tokens * (size + 1) + received + rows))
    return dispatch, Work(num_bytes=hidden * size * (rows + received))


def _mlp(config: ModelConfig, share: Share, width: int) -> Work:
    total = _product(share, config.hidden_size, 2 * width, "fp8", 1)
    total.add(_product(share, width, config.hidden_size, "fp8", 1))
    return total


def _head(config: ModelConfig, share: Share) -> Work:
    weight = config.vocab_size * config.hidden_size * share.activation_bytes
    rows = share.num_logits * (config.hidden_size * share.activation_bytes + config.vocab_size * 4)
    return _bf16(2 * share.num_logits * config.vocab_size * config.hidden_size, weight + rows)


def _product(share: Share, depth: int, width: int, kind: Kind, weight_bytes: int) -> Work:
    """All tokens times one weight [width, depth]."""
    weights = matrix_bytes(width, depth) if kind == "fp8" else width * depth * weight_bytes
    row = fp8_row_bytes(depth) if kind == "fp8" else depth * share.activation_bytes
    moved = share.num_tokens * (row + width * share.activation_bytes)
    return Work(num_bytes=weights + moved, flops={kind: 2 * share.num_tokens * depth * width})


def _moved(share: Share, elements: int) -> Work:
    """So many elements per token, read or written."""
    return Work(num_bytes=share.num_tokens * elements * share.activation_bytes)


def _bf16(flops: float, num_bytes: float) -> Work:
    return Work(num_bytes=num_bytes, flops={"bf16": flops})


def fp8_row_bytes(width: int) -> int:
    """A row in FP8 with an fp32 scale per 128 elements."""
    return width + 4 * -(-width // 128)


def matrix_bytes(rows: int, columns: int) -> int:
    """An FP8 matrix with an fp32 scale per 128x128 block."""
    return rows * columns + 4 * -(-rows // 128) * -(-columns // 128)


def expert_bytes(hidden: int, inner: int) -> int:
    """One expert's two FP8 matrices."""
    return matrix_bytes(2 * inner, hidden) + matrix_bytes(hidden, inner)


def weight_bytes(config: ModelConfig, num_local: int, dtype_bytes: int = 2) -> dict[Group, int]:
    """Memory of one rank's weights by group: FP8 with scales, but for what slice_model.py keeps in dtype_bytes or fp32."""
    hidden, layers, sparse = config.hidden_size, config.num_hidden_layers, len(config.sparse_layers)
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    assert config.q_lora_rank is not None, "DeepSeek-V3 has a query latent"
    attention = (
        matrix_bytes(config.q_lora_rank + config.latent_dim, hidden)
        + matrix_bytes(heads * query, config.q_lora_rank)
        + matrix_bytes(hidden, heads * config.v_head_dim)
        + dtype_bytes * heads * (config.qk_nope_head_dim + config.v_head_dim) * latent
        + dtype_bytes * (config.q_lora_rank + latent + hidden)  # norms; one tensor serves both of a layer
    )
    shared = expert_bytes(hidden, config.moe_intermediate_size * config.n_shared_experts) if config.n_shared_experts else 0
    return {
        "attention": layers * attention,
        "gate": sparse * 4 * config.n_routed_experts * hidden,
        "experts": sparse * num_local * expert_bytes(hidden, config.moe_intermediate_size),
        "shared": sparse * shared,
        "dense": (layers - sparse) * expert_bytes(hidden, config.intermediate_size),
        "head": 2 * dtype_bytes * config.vocab_size * hidden,
    }


def kv_bytes_per_token(config: ModelConfig, dtype_bytes: int = 2) -> int:
    return config.num_hidden_layers * config.latent_dim * dtype_bytes


def activation_bytes(config: ModelConfig, share: Share, ep_size: int) -> int:
    """What a step holds at once, roughly: a token's hidden rows, queries and outputs, and twice all that the experts see."""
    hidden, inner, size = config.hidden_size, config.moe_intermediate_size, share.activation_bytes
    room = share.num_local * ep_size * share.num_tokens if share.decode else share.num_rows
    per_row = hidden * (1 + size) + 2 * inner * size + inner
    per_token = 8 * hidden * size + config.num_attention_heads * (2 * config.qk_nope_head_dim + 2 * config.v_head_dim) * size
    logits = share.num_logits * config.vocab_size * (4 + size)
    return 2 * room * per_row + share.num_tokens * per_token + share.num_received * hidden * (1 + 2 * size) + logits
