"""How a model uses DeepEP: modes, tokens per rank, the tuning of its kernels, and what is exchanged among whom.

Without torch, so that a launcher can read it. Formulas are those of DeepEP 2.1.0 (github.com/deepseek-ai/DeepEP). Generation
`deepep` is its `Buffer` over NVSHMEM, `deepep_v2` its `ElasticBuffer` over NCCL.

R ranks, E expert slots of all ranks, H hidden size, K choices per token, T tokens of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Generation = Literal["deepep", "deepep_v2"]
DeepEPMode = Literal["auto", "normal", "low_latency"]

NVLINK_PEERS = 8
"""Ranks of one node; between nodes the first generation pairs GPUs of the same number."""
DEFAULT_SMS = 20
_HINT_TOPK = _HINT_SCALES = 128
_SOURCE_META_BYTES = 8
INT4_BYTES = 16
BUFFER_ALIGNMENT = 128

# Ranks -> chunks (NVLink send, NVLink receive, RDMA send, RDMA receive) that DeepEP recommends.
_DISPATCH_CHUNKS = {
    2: (24, 256, 6, 128),
    **dict.fromkeys((4, 8), (6, 256, 6, 128)),
    16: (36, 288, 20, 128),
    **dict.fromkeys((24, 32, 48, 64), (32, 288, 8, 128)),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
_COMBINE_CHUNKS = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    **dict.fromkeys((24, 32, 48, 64), (1, 288, 8, 128)),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    **dict.fromkeys((144, 160), (2, 720, 8, 128)),
}


@dataclass(frozen=True, kw_only=True)
class ChunkSizes:
    """Tuning of one of the normal kernels: SMs, and tokens per chunk. Field names are those of DeepEP's `Config`.

    Raises ValueError for what DeepEP's `Config` would refuse.
    """

    num_sms: int = DEFAULT_SMS
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        if self.num_sms <= 0 or self.num_sms % 2:
            raise ValueError(f"num_sms {self.num_sms}: an even number above 0")
        pairs = {
            "nvl": (self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens, 1),
            "rdma": (self.num_max_rdma_chunked_send_tokens, self.rdma_room, 2),
        }
        for link, (send, room, times) in pairs.items():
            if send <= 0 or room < times * send + (times == 1):
                wanted = "more than" if times == 1 else "at least twice"
                raise ValueError(f"num_max_{link}_chunked_recv_tokens {room}: {wanted} the {send} tokens of a chunk that is sent")

    @property
    def rdma_room(self) -> int:
        """Tokens of the RDMA receive queue: rounded up to whole chunks."""
        send = max(self.num_max_rdma_chunked_send_tokens, 1)
        return -(-self.num_max_rdma_chunked_recv_tokens // send) * send

    def nvl_bytes(self, hidden_bytes: int, num_ranks: int) -> int:
        """NVLink buffer that one of the normal kernels wants."""
        nodes = max(num_ranks // NVLINK_PEERS, 1)
        queues = self.num_sms // 2 * min(num_ranks, NVLINK_PEERS)
        per_token = self.num_max_nvl_chunked_recv_tokens * _token_bytes(hidden_bytes)
        return round_up(queues * ((2 * nodes + 3) * 4 + per_token), BUFFER_ALIGNMENT)

    def rdma_bytes(self, hidden_bytes: int, num_ranks: int) -> int:
        """RDMA buffer that one of the normal kernels wants; none within a node."""
        if num_ranks <= NVLINK_PEERS:
            return 0
        queues = self.num_sms // 2 * (num_ranks // NVLINK_PEERS)
        per_token = self.rdma_room * (_token_bytes(hidden_bytes) + INT4_BYTES)
        return round_up(queues * 2 * ((NVLINK_PEERS * 2 + 2) * 4 + per_token), BUFFER_ALIGNMENT)


@dataclass(frozen=True, kw_only=True)
class DeepEPSettings:
    """How a model uses DeepEP.

    mode: the modes its steps may take. max_tokens_per_rank: of a low-latency step. max_normal_tokens_per_rank: of a normal one (the
    second generation's buffer is made for them). fp8: tokens travel as FP8 with one scale per 128 channels, else as bf16.
    timeout_s: how long the second generation waits for others; the first has 100 s built in. dispatch, combine: tuning of the
    normal kernels (None: as DeepEP recommends).
    """

    mode: DeepEPMode = "auto"
    max_tokens_per_rank: int = 128
    max_normal_tokens_per_rank: int = 4096
    fp8: bool = False
    timeout_s: int = 100
    dispatch: ChunkSizes | None = None
    combine: ChunkSizes | None = None

    @property
    def normal(self) -> bool:
        """Whether a step may be a normal one."""
        return self.mode != "low_latency"

    @property
    def low_latency(self) -> bool:
        """Whether a step may be a low-latency one."""
        return self.mode != "normal"


@dataclass(frozen=True, kw_only=True)
class ExchangeShape:
    """What is exchanged among whom: R, the ranks of one node, E, H and K."""

    num_ranks: int
    ranks_per_node: int
    num_slots: int
    hidden_size: int
    topk: int

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def num_local(self) -> int:
        return self.num_slots // self.num_ranks


def recommended_dispatch(num_ranks: int) -> ChunkSizes:
    """DeepEP's own choice for its normal dispatch. Raises KeyError for a number of ranks that has none."""
    return _chunks(_DISPATCH_CHUNKS[num_ranks])


def recommended_combine(num_ranks: int) -> ChunkSizes:
    """DeepEP's own choice for its normal combine. Raises KeyError for a number of ranks that has none."""
    return _chunks(_COMBINE_CHUNKS[num_ranks])


def _chunks(tokens: tuple[int, int, int, int]) -> ChunkSizes:
    return ChunkSizes(
        num_max_nvl_chunked_send_tokens=tokens[0],
        num_max_nvl_chunked_recv_tokens=tokens[1],
        num_max_rdma_chunked_send_tokens=tokens[2],
        num_max_rdma_chunked_recv_tokens=tokens[3],
    )


def _token_bytes(hidden_bytes: int) -> int:
    """A token in a queue of the normal kernels: its row, where it comes from, and room for 128 choices and scales."""
    return hidden_bytes + _SOURCE_META_BYTES + _HINT_TOPK * (8 + 4) + _HINT_SCALES * 4


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple
