"""Which layouts fit a model: every size that is cut into equal parts must be a multiple of the number of parts.

Knows the flags and the model's numbers (`ModelShape`); takes a layout that `launch/layout_rules.py` found sound.
"""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.launch.config import ServerConfig
from moesaic.launch.conflicts import Conflict, divisors, nearest
from moesaic.launch.topology import ModelShape, Topology

FP8_BLOCK = 128
FP8_ROW_BYTES = 16
"""What the tensor memory accelerator steps over is a multiple of it."""


def fp8_weight_conflicts(config: ServerConfig, shape: ModelShape) -> Iterator[Conflict]:
    """What weights that stay in FP8 (on CUDA) want besides `block_conflicts`: whole blocks in cuts of rows, and aligned rows."""
    topology = Topology.from_config(config)
    if shape.hidden_size % FP8_BLOCK:
        yield _fp8_conflict(f"weights in FP8 want multiples of {FP8_BLOCK}, and hidden_size is {shape.hidden_size}")
    query_rows, parts = shape.num_heads * shape.qk_head_dim, topology.attn_tp_size
    if parts > 1 and query_rows % (parts * FP8_BLOCK):
        yield _cut_conflict("attention TP cuts num_heads x query head dim", query_rows, parts, "a larger --dp-size")
    depths = {
        "q_lora_rank": shape.q_lora_rank or 0,
        "a rank's part of num_heads x v_head_dim": shape.num_heads * shape.v_head_dim // parts,
        "a rank's part of intermediate_size": shape.intermediate_size // topology.moe_dense_tp_size,
        "the shared experts' width": shape.moe_intermediate_size * shape.num_shared_experts,
    }
    for what, depth in depths.items():
        if depth % FP8_ROW_BYTES:
            yield _fp8_conflict(f"rows of weights in FP8 are multiples of {FP8_ROW_BYTES} bytes, and {what} is {depth}")


def _fp8_conflict(reason: str) -> Conflict:
    return Conflict(flags="--quantization fp8", reason=reason, remedy="--quantization none")


def model_conflicts(config: ServerConfig, shape: ModelShape) -> Iterator[Conflict]:
    """Model sizes that the layout doesn't divide."""
    topology = Topology.from_config(config)
    yield from _attention_conflicts(config, shape, topology)
    yield from _expert_conflicts(config, shape, topology)
    yield from _dense_conflicts(config, shape, topology)
    yield from _head_conflicts(config, shape, topology)
    if config.quantization == "fp8":
        yield from block_conflicts(config, shape, topology)


def _attention_conflicts(config: ServerConfig, shape: ModelShape, topology: Topology) -> Iterator[Conflict]:
    tp, dp = config.tp_size, config.dp_size
    if shape.num_heads % topology.attn_tp_size:
        legal = [value for value in divisors(tp) if shape.num_heads % (tp // value) == 0]
        yield Conflict(
            flags=f"--tp-size {tp} --dp-size {dp}",
            reason=(
                f"attention TP {topology.attn_tp_size} (= tp / dp) does not divide the model's {shape.num_heads} attention heads"
            ),
            remedy=nearest("--dp-size", legal, dp, otherwise=f"choose a tp that divides {shape.num_heads}"),
        )


def _expert_conflicts(config: ServerConfig, shape: ModelShape, topology: Topology) -> Iterator[Conflict]:
    tp, ep, moe_tp = config.tp_size, topology.ep_size, topology.moe_tp_size
    # With redundant experts it is the slots that are dealt out (placement_conflicts): 256 experts in 288 slots suit 72 ranks.
    if not config.ep_num_redundant_experts and shape.num_experts % ep:
        yield _experts_conflict(config, ep, shape.num_experts)
    if shape.moe_intermediate_size % moe_tp:
        legal = [value for value in divisors(tp) if shape.moe_intermediate_size % (tp // value) == 0]
        yield Conflict(
            flags=f"--tp-size {tp} --ep-size {ep}",
            reason=f"expert TP {moe_tp} (= tp / ep) doesn't divide moe_intermediate_size {shape.moe_intermediate_size}",
            remedy=nearest("--ep-size", legal, ep),
        )


def _experts_conflict(config: ServerConfig, ep: int, num_experts: int) -> Conflict:
    reason = f"{ep} expert-parallel ranks cannot hold the model's {num_experts} experts in equal parts"
    if config.moe_a2a_backend == "none":
        legal = [value for value in divisors(config.tp_size) if num_experts % value == 0]
        flags = f"--tp-size {config.tp_size} --ep-size {ep}"
        return Conflict(flags=flags, reason=reason, remedy=nearest("--ep-size", legal, ep))
    flags = f"--tp-size {config.tp_size} --moe-a2a-backend {config.moe_a2a_backend}"
    legal = [value for value in divisors(num_experts) if value % config.dp_size == 0]
    otherwise = "--moe-a2a-backend none with a smaller --ep-size"
    remedy = nearest("--tp-size", legal, config.tp_size, otherwise=otherwise)
    return Conflict(flags=flags, reason=reason, remedy=f"{remedy}, or --ep-num-redundant-experts {-num_experts % ep}")


def _dense_conflicts(config: ServerConfig, shape: ModelShape, topology: Topology) -> Iterator[Conflict]:
    layout = f"--tp-size {config.tp_size} --dp-size {config.dp_size}"
    dense_tp, attn_tp = topology.moe_dense_tp_size, topology.attn_tp_size
    if shape.intermediate_size % dense_tp:
        yield Conflict(
            flags=f"{layout}, dense TP {dense_tp}",
            reason=f"dense TP {dense_tp} does not divide intermediate_size {shape.intermediate_size}",
            remedy="--moe-dense-tp-size 1",
        )
    shared = shape.moe_intermediate_size * shape.num_shared_experts
    # With an all-to-all backend each rank runs the shared expert whole, on its own share of the tokens.
    if config.moe_a2a_backend == "none" and shared % attn_tp:
        yield Conflict(
            flags=f"{layout} --moe-a2a-backend none",
            reason=f"attention TP {attn_tp} does not divide the shared experts' width {shared}",
            remedy="--moe-a2a-backend torch, or a larger --dp-size",
        )


def _head_conflicts(config: ServerConfig, shape: ModelShape, topology: Topology) -> Iterator[Conflict]:
    parts = topology.attn_tp_size if config.enable_dp_lm_head else topology.world_size
    if shape.vocab_size % parts == 0:
        return
    remedy = f"choose a --tp-size that divides {shape.vocab_size}"
    if config.dp_size > 1 and not config.enable_dp_lm_head and shape.vocab_size % topology.attn_tp_size == 0:
        remedy = f"add --enable-dp-lm-head, which splits it {topology.attn_tp_size} ways, or {remedy}"
    yield Conflict(
        flags=f"--tp-size {config.tp_size} --dp-size {config.dp_size}",
        reason=f"the head's {shape.vocab_size} rows (vocab_size) cannot be split into {parts} equal parts",
        remedy=remedy,
    )


def block_conflicts(config: ServerConfig, shape: ModelShape, topology: Topology) -> Iterator[Conflict]:
    """W8A8 scales belong to blocks of 128 channels: a cut inside a block would make layouts disagree."""
    shared_parts = topology.attn_tp_size if config.moe_a2a_backend == "none" else 1
    shared = shape.moe_intermediate_size * shape.num_shared_experts
    cuts = (
        (
            "attention TP cuts num_heads x v_head_dim",
            shape.num_heads * shape.v_head_dim,
            topology.attn_tp_size,
            "a larger --dp-size",
        ),
        ("expert TP cuts moe_intermediate_size", shape.moe_intermediate_size, topology.moe_tp_size, "a larger --ep-size"),
        ("dense TP cuts intermediate_size", shape.intermediate_size, topology.moe_dense_tp_size, "--moe-dense-tp-size 1"),
        ("attention TP cuts the shared experts' width", shared, shared_parts, "an all-to-all backend (--moe-a2a-backend)"),
    )
    for what, size, parts, remedy in cuts:
        if parts > 1 and size % (parts * FP8_BLOCK):
            yield _cut_conflict(what, size, parts, remedy)


def _cut_conflict(what: str, size: int, parts: int, remedy: str) -> Conflict:
    return Conflict(
        flags="--quantization fp8",
        reason=f"{what} = {size} into {parts} parts that are no multiples of the FP8 block of {FP8_BLOCK}",
        remedy=f"--quantization none, or {remedy}",
    )
