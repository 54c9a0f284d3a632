"""What DeepEP supports: every size of a layout that it would refuse or suffer from, with the remedy.

Pure arithmetic without torch, so that a launcher can refuse before any process starts. The limits are those of DeepEP 2.1.0's host
code and kernels (github.com/deepseek-ai/DeepEP, csrc).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.moe.deepep_config import INT4_BYTES, NVLINK_PEERS, DeepEPSettings, ExchangeShape, Generation
from moesaic.moe.deepep_memory import low_latency_bytes, mib

INTRANODE_RANKS = (2, 4, 8)
NORMAL_NODES = (2, 3, 4, 6, 8, 12, 16, 18, 20)
LOW_LATENCY_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
LOW_LATENCY_TOPK = 11
LOW_LATENCY_TOKENS = 1024
LOCAL_EXPERTS = 1024
V2_RANKS, V2_SLOTS, V2_LOCAL_EXPERTS, V2_TOPK = 1024, 2048, 256, 32
LARGEST_BUFFER = (2**31 - 1) * INT4_BYTES


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A size that DeepEP does not support, and what to do about it."""

    reason: str
    remedy: str


def violations(generation: Generation, settings: DeepEPSettings, shape: ExchangeShape) -> Iterator[Violation]:
    """Everything that DeepEP does not support in this layout."""
    if shape.num_slots % shape.num_ranks:
        most = shape.num_slots // shape.num_ranks * shape.num_ranks
        yield Violation(
            reason=f"{shape.num_slots} expert slots are no multiple of {shape.num_ranks} ranks",
            remedy=f"--ep-num-redundant-experts {most + shape.num_ranks - shape.num_slots} more, or another --tp-size",
        )
    if generation == "deepep":
        yield from _v1_violations(settings, shape)
    else:
        yield from _v2_violations(settings, shape)


def _v1_violations(settings: DeepEPSettings, shape: ExchangeShape) -> Iterator[Violation]:
    yield from _rank_violations(settings, shape)
    if shape.num_local > LOCAL_EXPERTS:
        yield Violation(reason=f"{shape.num_local} expert slots on a rank, of at most {LOCAL_EXPERTS}", remedy="a larger --tp-size")
    if settings.low_latency:
        yield from _low_latency_violations(settings, shape)
    yield from _hidden_violations(settings, shape)


def _rank_violations(settings: DeepEPSettings, shape: ExchangeShape) -> Iterator[Violation]:
    ranks, per_node = shape.num_ranks, shape.ranks_per_node
    if shape.num_nodes == 1 and ranks not in INTRANODE_RANKS:
        yield Violation(reason=f"{ranks} ranks within a node", remedy="--tp-size 2, 4 or 8, or --moe-a2a-backend torch")
    if shape.num_nodes > 1 and per_node != NVLINK_PEERS:
        yield Violation(
            reason=f"{per_node} ranks on each of {shape.num_nodes} nodes; between nodes it wants {NVLINK_PEERS} on each",
            remedy=f"--nnodes {max(ranks // NVLINK_PEERS, 1)} with {NVLINK_PEERS} ranks on each, or --moe-a2a-backend deepep_v2",
        )
    elif shape.num_nodes > 1 and settings.normal and shape.num_nodes not in NORMAL_NODES:
        sizes = ", ".join(str(nodes * NVLINK_PEERS) for nodes in NORMAL_NODES)
        yield Violation(
            reason=f"{ranks} ranks in normal mode, which is built for {sizes}",
            remedy="one of these, or --deepep-mode low_latency (decode instances), for any multiple of 8",
        )


def _low_latency_violations(settings: DeepEPSettings, shape: ExchangeShape) -> Iterator[Violation]:
    tokens, hidden = settings.max_tokens_per_rank, shape.hidden_size
    if shape.topk > LOW_LATENCY_TOPK:
        yield Violation(
            reason=f"top-{shape.topk} in low-latency mode, which takes up to {LOW_LATENCY_TOPK}", remedy="--deepep-mode normal"
        )
    if hidden not in LOW_LATENCY_HIDDEN:
        sizes = ", ".join(map(str, LOW_LATENCY_HIDDEN))
        yield Violation(
            reason=f"hidden size {hidden} in low-latency mode, which is built for {sizes}",
            remedy="--deepep-mode normal, or --moe-a2a-backend deepep_v2",
        )
    if tokens > LOW_LATENCY_TOKENS:
        yield Violation(
            reason=f"{tokens} tokens per rank in low-latency mode; 128 are usual, {LOW_LATENCY_TOKENS} the most",
            remedy=f"--deepep-max-dispatch-tokens-per-rank {LOW_LATENCY_TOKENS} or less",
        )
    if tokens * shape.num_ranks % 4:
        yield Violation(
            reason=f"{tokens} tokens per rank x {shape.num_ranks} ranks are no multiple of 4",
            remedy=f"--deepep-max-dispatch-tokens-per-rank {-(-tokens // 4) * 4}",
        )
    room = low_latency_bytes(tokens, shape)
    if room > LARGEST_BUFFER:
        yield Violation(
            reason=f"{tokens} tokens per rank need a low-latency buffer of {mib(room)}, and {mib(LARGEST_BUFFER)} is the most",
            remedy="a smaller --deepep-max-dispatch-tokens-per-rank",
        )


def _hidden_violations(settings: DeepEPSettings, shape: ExchangeShape) -> Iterator[Violation]:
    """Rows travel in pieces of 16 bytes; FP8 has a scale for each 128 channels."""
    multiple = 128 if settings.fp8 else 8
    if shape.hidden_size % multiple:
        yield Violation(
            reason=f"hidden size {shape.hidden_size} is no multiple of {multiple}",
            remedy="--quantization none" if settings.fp8 else "--moe-a2a-backend torch",
        )


def _v2_violations(settings: DeepEPSettings, shape: ExchangeShape) -> Iterator[Violation]:
    limits = {
        "ranks": (shape.num_ranks, V2_RANKS, "a smaller --tp-size"),
        "expert slots": (shape.num_slots, V2_SLOTS, "fewer --ep-num-redundant-experts"),
        "expert slots on a rank": (shape.num_local, V2_LOCAL_EXPERTS, "a larger --tp-size"),
        "choices per token (top-k)": (shape.topk, V2_TOPK, "--moe-a2a-backend torch"),
    }
    for what, (value, most, remedy) in limits.items():
        if value > most:
            yield Violation(reason=f"{value} {what}, of at most {most}", remedy=remedy)
    if shape.num_ranks == 1:
        yield Violation(reason="a single rank sends nothing", remedy="--moe-a2a-backend none, or --tp-size 2 or more")
    yield from _hidden_violations(settings, shape)
