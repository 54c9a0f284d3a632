"""Chunk sizes of the normal kernels, and how much buffer memory both modes want, as DeepEP computes it."""

from __future__ import annotations

from .checks import host_assert

NVL_PEERS = 8
NUM_MAX_TOPK = NUM_MAX_SCALES = 128
SOURCE_META_BYTES = 8
BUFFER_ALIGNMENT = 128
CONFIG = "csrc/legacy/config.hpp"


class Config:
    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        nvl_send, nvl_recv = num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_recv = num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens
        host_assert(num_sms >= 0, "num_sms >= 0", CONFIG)
        host_assert(0 < nvl_send < nvl_recv, "num_max_nvl_chunked_send_tokens < num_max_nvl_chunked_recv_tokens", CONFIG)
        host_assert(rdma_send > 0 and rdma_recv > 0, "num_max_rdma_chunked_send_tokens > 0", CONFIG)
        rdma_recv = -(-rdma_recv // rdma_send) * rdma_send
        host_assert(rdma_send <= rdma_recv / 2, "num_max_rdma_chunked_send_tokens <= num_max_rdma_chunked_recv_tokens / 2", CONFIG)
        self.num_sms = num_sms
        self.nvl_recv, self.rdma_recv = nvl_recv, rdma_recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        host_assert(num_ranks < NVL_PEERS or num_ranks % NVL_PEERS == 0, "num_ranks % LEGACY_NUM_MAX_NVL_PEERS == 0", CONFIG)
        rdma_ranks, nvl_ranks = max(num_ranks // NVL_PEERS, 1), min(num_ranks, NVL_PEERS)
        per_token = hidden_bytes + SOURCE_META_BYTES + NUM_MAX_TOPK * (8 + 4) + NUM_MAX_SCALES * 4
        channels = self.num_sms // 2 * nvl_ranks
        return _round_up(channels * ((2 * rdma_ranks + 3) * 4 + self.nvl_recv * per_token))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        if num_ranks <= NVL_PEERS:
            return 0
        host_assert(num_ranks % NVL_PEERS == 0, "num_ranks % LEGACY_NUM_MAX_NVL_PEERS == 0", CONFIG)
        per_token = hidden_bytes + SOURCE_META_BYTES + NUM_MAX_TOPK * (8 + 4) + NUM_MAX_SCALES * 4 + 16
        channels = self.num_sms // 2 * (num_ranks // NVL_PEERS)
        return _round_up(channels * 2 * ((NVL_PEERS * 2 + 2) * 4 + self.rdma_recv * per_token))


def low_latency_bytes(num_tokens: int, hidden: int, num_experts: int) -> int:
    """What the low-latency layout fills."""
    num_scales = hidden // 128
    dispatch_message = 16 + max(2 * hidden, hidden + 4 * num_scales)
    combine_message = 4 * num_scales + 2 * hidden
    send = max(num_tokens * dispatch_message, num_experts * num_tokens * combine_message)
    receive = num_experts * num_tokens * max(dispatch_message, combine_message)
    return 2 * (send + receive + _round_up(num_experts * 4))


def low_latency_size_hint(num_tokens: int, hidden: int, num_experts: int) -> int:
    total = low_latency_bytes(num_tokens, hidden, num_experts)
    return (total + BUFFER_ALIGNMENT) // BUFFER_ALIGNMENT * BUFFER_ALIGNMENT


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT
