"""How much memory and how many queues DeepEP's buffers need on a rank: for the resolution report, the memory plan and the buffers.

Pure arithmetic without torch; the formulas are those of DeepEP 2.1.0's host code (github.com/deepseek-ai/DeepEP, csrc). What a
buffer is made with in the end is the installed library's own figure, which is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.moe.deepep_config import (
    BUFFER_ALIGNMENT,
    INT4_BYTES,
    NVLINK_PEERS,
    DeepEPSettings,
    ExchangeShape,
    Generation,
    recommended_combine,
    recommended_dispatch,
    round_up,
)

DEFAULT_QP_DEPTH = 1024
"""Of NVSHMEM, if NVSHMEM_QP_DEPTH says nothing."""
_V2_ALIGNMENT, _TMA_ALIGNMENT = 2 << 20, 32
_V2_CHANNELS = 8 * 160


@dataclass(frozen=True, kw_only=True)
class BufferPlan:
    """Memory and queues of one rank. First generation: num_nvl_bytes, num_rdma_bytes, queue pairs (QPs) to each rank and their
    depth (0: no RDMA). Second: num_bytes in all.
    """

    num_nvl_bytes: int = 0
    num_rdma_bytes: int = 0
    num_qps_per_rank: int = 0
    qp_depth: int = 0
    num_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.num_nvl_bytes + self.num_rdma_bytes + self.num_bytes

    def describe(self) -> str:
        """For the resolution report."""
        if self.num_bytes:
            return f"buffer {mib(self.num_bytes)}"
        parts = [f"NVLink buffer {mib(self.num_nvl_bytes)}", f"RDMA buffer {mib(self.num_rdma_bytes)}"]
        if self.qp_depth:
            parts.append(f"{self.num_qps_per_rank} QPs per rank of depth {self.qp_depth} (NVSHMEM_QP_DEPTH)")
        return ", ".join(parts)


def plan_buffers(generation: Generation, settings: DeepEPSettings, shape: ExchangeShape) -> BufferPlan:
    """Sizes for a layout without violations."""
    if generation == "deepep_v2":
        return BufferPlan(num_bytes=_v2_bytes(settings, shape))
    hidden_bytes = 2 * shape.hidden_size
    nvl = rdma = qps = 0
    if settings.normal:
        tunings = (
            settings.dispatch or recommended_dispatch(shape.num_ranks),
            settings.combine or recommended_combine(shape.num_ranks),
        )
        nvl = max(each.nvl_bytes(hidden_bytes, shape.num_ranks) for each in tunings)
        rdma = max(each.rdma_bytes(hidden_bytes, shape.num_ranks) for each in tunings)
        qps = tunings[0].num_sms if shape.num_ranks > NVLINK_PEERS else 0
    if settings.low_latency:
        rdma = max(rdma, low_latency_bytes(settings.max_tokens_per_rank, shape))
        qps = max(qps, shape.num_local)
    depth = qp_depth(settings.max_tokens_per_rank if settings.low_latency else 0) if qps else 0
    return BufferPlan(num_nvl_bytes=nvl, num_rdma_bytes=rdma, num_qps_per_rank=qps, qp_depth=depth)


def qp_depth(max_tokens_per_rank: int) -> int:
    """Entries of an NVSHMEM queue: room for 2 (T + 1) work requests in flight, at least NVSHMEM's default, a power of two."""
    return max(DEFAULT_QP_DEPTH, 1 << (2 * (max_tokens_per_rank + 1) - 1).bit_length())


def low_latency_bytes(max_tokens_per_rank: int, shape: ExchangeShape) -> int:
    """RDMA buffer of the low-latency kernels: two send and two receive buffers, as if everything was bf16."""
    num_scales = shape.hidden_size // 128
    dispatch = INT4_BYTES + max(2 * shape.hidden_size, shape.hidden_size + 4 * num_scales)
    combine = 4 * num_scales + 2 * shape.hidden_size
    rows = shape.num_slots * max_tokens_per_rank
    send, receive = max(max_tokens_per_rank * dispatch, rows * combine), rows * max(dispatch, combine)
    total = 2 * (send + receive + round_up(4 * shape.num_slots, BUFFER_ALIGNMENT))
    return (total // BUFFER_ALIGNMENT + 1) * BUFFER_ALIGNMENT


def _v2_bytes(settings: DeepEPSettings, shape: ExchangeShape) -> int:
    """`ElasticBuffer`'s memory, whose ranks reach each other over NVLink on a node, and nodes each other over RDMA."""
    tokens = max(settings.max_normal_tokens_per_rank * settings.normal, settings.max_tokens_per_rank * settings.low_latency)
    scale_bytes = -(-shape.hidden_size // 32) * 4 if settings.fp8 else 0
    metadata = round_up(8 * shape.topk + 4 * (1 + shape.topk), _TMA_ALIGNMENT)
    dispatch = round_up(shape.hidden_size * (1 if settings.fp8 else 2), _TMA_ALIGNMENT) + metadata
    dispatch += round_up(scale_bytes, _TMA_ALIGNMENT)
    combine = round_up(2 * shape.hidden_size, _TMA_ALIGNMENT) + round_up(8 * shape.topk, _TMA_ALIGNMENT)
    nodes, per_node = shape.num_nodes, shape.ranks_per_node
    if nodes == 1:
        rows = (per_node * tokens, min(per_node, shape.topk) * tokens)
    else:
        between = nodes * (tokens + _V2_CHANNELS)
        rows = (
            per_node * nodes * tokens + tokens + between,
            (min(per_node, shape.topk) * nodes + min(nodes, shape.topk)) * tokens + between,
        )
    return round_up(max(rows[0] * dispatch, rows[1] * combine), _V2_ALIGNMENT)


def mib(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / 2**20:,.0f} MiB"
