"""`Buffer`, the first generation's API: construction and the normal kernels. The low-latency ones are in low_latency.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_matrix, host_assert, misuse, poisoned
from .config import NVL_PEERS, Config, low_latency_size_hint
from .event import EventHandle, EventOverlap
from .fabric import Fabric, LateError, as_bytes, from_bytes
from .low_latency import LowLatencyKernels

# Ranks -> (NVLink send and receive chunks, RDMA send and receive chunks).
DISPATCH_CHUNKS = {2: (24, 256, 6, 128), 4: (6, 256, 6, 128), 8: (6, 256, 6, 128)}
COMBINE_CHUNKS = {2: (10, 256, 6, 128), 4: (9, 256, 6, 128), 8: (4, 256, 6, 128)}


class Buffer(LowLatencyKernels):
    num_sms: int = 20
    cpu_timeout_s: float = 100.0

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
    ) -> None:
        if group is None:
            raise ValueError("Either 'group' or 'comm' must be provided.")
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        host_assert(
            num_nvl_bytes % 128 == 0 and num_rdma_bytes % 128 == 0, "num_nvl_bytes % LEGACY_NUM_BUFFER_ALIGNMENT_BYTES == 0"
        )
        host_assert(self.group_size < NVL_PEERS or self.group_size % NVL_PEERS == 0, "num_ranks % LEGACY_NUM_MAX_NVL_PEERS == 0")
        self.num_nvl_bytes, self.num_rdma_bytes, self.low_latency_mode = num_nvl_bytes, num_rdma_bytes, low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        if low_latency_mode:
            assert num_qps_per_rank > 0
            self.nvshmem_qp_depth = int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))
        self.num_qps_per_rank = num_qps_per_rank
        self.fabric = Fabric(group)
        self.start_low_latency(enable_shrink)

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int) -> int:
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in DISPATCH_CHUNKS, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, *DISPATCH_CHUNKS[num_ranks])

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        assert num_ranks in COMBINE_CHUNKS, f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, *COMBINE_CHUNKS[num_ranks])

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        check_matrix(topk_idx, "topk_idx")
        if topk_idx.dtype != torch.int64:
            raise TypeError(f"expected scalar type Long but found {topk_idx.dtype}")
        host_assert(num_experts > 0, "num_experts > 0")
        self._check_streams(previous_event, async_finish, allocate_on_comm_stream)
        per_rank = poisoned(self.group_size, dtype=torch.int32)
        per_expert = poisoned(num_experts, dtype=torch.int32)
        in_rank = torch.zeros(len(topk_idx), self.group_size, dtype=torch.bool)

        def fill() -> None:
            chosen = torch.zeros(len(topk_idx), num_experts + 1, dtype=torch.bool).scatter_(1, topk_idx + 1, True)[:, 1:]
            in_rank.copy_(chosen.view(len(topk_idx), self.group_size, num_experts // self.group_size).any(2))
            per_rank.copy_(in_rank.sum(0))
            per_expert.copy_(chosen.sum(0))

        return per_rank, None, per_expert, in_rank, _finish(fill, async_finish)

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Tensor, Tensor, list[int], tuple[Any, ...], EventOverlap]:
        if handle is not None or num_worst_tokens:
            raise NotImplementedError("the stand-in has neither cached layouts nor num_worst_tokens")
        config = self.get_dispatch_config(self.group_size) if config is None else config
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None
        values, scales = x if isinstance(x, tuple) else (x, None)
        self._check_streams(previous_event, async_finish, allocate_on_comm_stream)
        if previous_event is not None and previous_event.event is not None:
            previous_event.event.current_stream_wait()  # the communication stream does
        self._check_dispatch(values, scales, is_token_in_rank, topk_idx, topk_weights, config)
        host_assert(bool((num_tokens_per_rank == is_token_in_rank.sum(0)).all()), "num_tokens_per_rank matches is_token_in_rank")
        self.fabric.begin()
        self.dirty = True

        num_local = len(num_tokens_per_expert) // self.group_size
        tokens = [column.nonzero().squeeze(1) for column in is_token_in_rank.unbind(1)]
        counts = torch.cat([num_tokens_per_rank.view(-1, 1), num_tokens_per_expert.view(self.group_size, num_local)], 1).long()
        rows = [
            self._pack(values, scales, topk_idx, topk_weights, of, rank * num_local, num_local) for rank, of in enumerate(tokens)
        ]
        counting = self.fabric.send([as_bytes(each.unsqueeze(0)) for each in counts])

        def rest_of_it(counted: list[Tensor]) -> None:
            self.fabric.send(rows, torch.cat(counted).view(torch.int64)[:, 0].tolist()).wait(1000)

        try:
            arrived = torch.cat(counting.wait(self.cpu_timeout_s, rest_of_it)).view(torch.int64)
        except LateError:
            raise RuntimeError("DeepEP error: CPU recv timeout") from None
        arriving = arrived[:, 0].tolist()
        received = [-(-count // expert_alignment) * expert_alignment for count in arrived[:, 1:].sum(0).tolist()]
        transfer = self.fabric.send(rows, arriving)

        total, hidden, topk = sum(arriving), values.shape[1], topk_idx.shape[1]
        recv_x = poisoned(total, hidden, dtype=values.dtype)
        recv_scales = None if scales is None else poisoned(total, scales.shape[1], dtype=torch.float32)
        recv_ids, recv_weights = poisoned(total, topk, dtype=torch.int64), poisoned(total, topk, dtype=torch.float32)
        recv_source = poisoned(total, dtype=torch.int32)
        snapshot = values.view(torch.uint8).clone()

        def fill() -> None:
            if not torch.equal(values.view(torch.uint8), snapshot):
                raise misuse("x was changed while an asynchronous dispatch was still reading it")
            columns = [(hidden, values.dtype), (topk, torch.int64), (topk, torch.float32), (1, torch.int32)]
            if scales is not None:
                columns.append((scales.shape[1], torch.float32))
            parts = from_bytes(torch.cat(transfer.wait(self.cpu_timeout_s)), *columns)
            recv_x.copy_(parts[0])
            recv_ids.copy_(parts[1])
            recv_weights.copy_(parts[2])
            recv_source.copy_(parts[3].squeeze(1))
            if recv_scales is not None:
                recv_scales.copy_(parts[4])

        prefix = torch.zeros(self.group_size, self.group_size, dtype=torch.int32)
        prefix[:, self.rank] = torch.tensor(arriving, dtype=torch.int32).cumsum(0)
        channels = torch.zeros(self.group_size, config.num_sms // 2, dtype=torch.int32)
        send_head = torch.zeros(len(values), self.group_size, dtype=torch.int32)
        handle = (prefix, channels, channels.clone(), recv_source, is_token_in_rank, send_head)
        out = recv_x if recv_scales is None else (recv_x, recv_scales)
        return out, recv_ids, recv_weights, received, handle, _finish(fill, async_finish)

    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        if topk_weights is not None or bias is not None:
            raise NotImplementedError("the stand-in combines rows alone")
        config = self.get_combine_config(self.group_size) if config is None else config
        prefix, _, _, source, in_rank, _ = handle
        self._check_streams(previous_event, async_finish, allocate_on_comm_stream)
        if previous_event is not None and previous_event.event is not None:
            previous_event.event.current_stream_wait()
        check_matrix(x, "x")
        if x.dtype != torch.bfloat16:
            raise RuntimeError(f"Assertion exception (csrc/kernels/legacy/launch.cuh:1): Unsupported type {x.dtype}")
        host_assert(len(source) == len(x), "src_idx.size(0) == num_tokens")
        host_assert(config.num_sms % 2 == 0, "config.num_sms % 2 == 0")
        self.fabric.begin()
        self.dirty = True
        leaving = prefix[:, self.rank].diff(prepend=prefix.new_zeros(1)).tolist()
        tokens = [column.nonzero().squeeze(1) for column in in_rank.unbind(1)]
        transfer = self.fabric.send([as_bytes(rows) for rows in x.split(leaving)], [len(of) for of in tokens])
        combined = poisoned(len(in_rank), x.shape[1], dtype=x.dtype)
        snapshot = x.clone()

        def fill() -> None:
            if not torch.equal(x.view(torch.uint8), snapshot.view(torch.uint8)):
                raise misuse("x was changed while an asynchronous combine was still reading it")
            total = torch.zeros(combined.shape, dtype=torch.float32)
            for of, rows in zip(tokens, transfer.wait(self.cpu_timeout_s), strict=True):
                total.index_add_(0, of, from_bytes(rows, (x.shape[1], x.dtype))[0].float())
            combined.copy_(total)

        return combined, None, _finish(fill, async_finish)

    @staticmethod
    def _pack(
        values: Tensor, scales: Tensor | None, topk_idx: Tensor, topk_weights: Tensor, tokens: Tensor, first: int, num_local: int
    ) -> Tensor:
        ids = topk_idx[tokens] - first
        here = (ids >= 0) & (ids < num_local)
        ids, weights = ids.masked_fill(~here, -1), topk_weights[tokens].masked_fill(~here, 0)
        columns = [values.view(torch.uint8)[tokens], ids, weights, tokens.int().unsqueeze(1)]
        return as_bytes(*columns, *([] if scales is None else [scales[tokens]]))

    def _check_dispatch(
        self, x: Tensor, scales: Tensor | None, in_rank: Tensor, topk_idx: Tensor, topk_weights: Tensor, config: Config
    ) -> None:
        check_matrix(x, "x")
        host_assert(x.shape[1] * x.element_size() % 16 == 0, "(x.size(1) * x.element_size()) % sizeof(int4) == 0")
        host_assert(config.num_sms % 2 == 0, "config.num_sms % 2 == 0")
        check_matrix(in_rank, "is_token_in_rank", torch.bool)
        host_assert(in_rank.shape == (len(x), self.group_size), "is_token_in_rank.size(0) == x.size(0)")
        check_matrix(topk_idx, "topk_idx", torch.int64)
        check_matrix(topk_weights, "topk_weights", torch.float32)
        host_assert(topk_idx.shape == topk_weights.shape and len(topk_idx) == len(x), "num_tokens == topk_idx->size(0)")
        if self.group_size not in (2, 4, 8):
            raise RuntimeError("Assertion exception (csrc/kernels/legacy/intranode.cu:1): Unsupported ranks")
        num_scales = 0
        if scales is None:
            host_assert(x.dtype == torch.bfloat16, "x.scalar_type() == torch::kBFloat16")
        else:
            host_assert(x.element_size() == 1, "x.element_size() == 1")
            host_assert(scales.dtype == torch.float32 and scales.dim() == 2, "x_scales->scalar_type() == torch::kFloat32")
            host_assert(len(scales) == len(x), "x_scales->size(0) == num_tokens")
            num_scales = scales.shape[1]
        queues = config.num_sms // 2 * self.group_size
        per_token = x.shape[1] * x.element_size() + 4 + topk_idx.shape[1] * 12 + 4 * num_scales
        needed = self.group_size**2 * 4 + queues * 16 + queues * config.nvl_recv * per_token
        host_assert(needed <= self.num_nvl_bytes, "num_ranks * num_ranks * sizeof(int) + ... <= num_nvl_bytes")

    @staticmethod
    def _check_streams(previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool) -> None:
        event = getattr(previous_event, "event", None)
        host_assert(not allocate_on_comm_stream or (event is not None and async_finish), "previous_event.has_value() and async")


def _finish(fill: Callable[[], None], async_finish: bool) -> EventOverlap:
    if async_finish:
        return EventOverlap(EventHandle(fill))
    fill()
    return EventOverlap(None)
