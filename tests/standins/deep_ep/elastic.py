"""`ElasticBuffer`, the second generation's API: one dispatch for all uses, rows once per rank, counts on the handle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import ELASTIC, check_matrix, host_assert, misuse, poisoned
from .event import EventHandle, EventOverlap
from .fabric import Fabric, LateError, as_bytes, from_bytes

MEMORY_ALIGNMENT = 2 << 20
TMA_ALIGNMENT = 32
DEFAULT_SMS = 24


@dataclass
class EPHandle:
    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    recv_src_metadata: Tensor


class ElasticBuffer:
    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        self.group, self.rank_idx, self.num_ranks = group, group.rank(), group.size()
        self.num_max_tokens_per_rank, self.deterministic = num_max_tokens_per_rank, deterministic
        self.explicitly_destroy = explicitly_destroy
        self._reductions = allow_multiple_reduction
        if num_bytes is None:
            host_assert(num_max_tokens_per_rank > 0 and hidden > 0, "num_max_tokens_per_rank > 0 and hidden > 0", ELASTIC)
            num_bytes = self._size(num_max_tokens_per_rank, hidden, num_topk or 32, use_fp8_dispatch)
        host_assert(num_bytes > 0 and num_bytes % MEMORY_ALIGNMENT == 0, "num_buffer_bytes % kNumAlignmentBytes == 0", ELASTIC)
        self.num_bytes = num_bytes
        self.cpu_timeout_s, self.gpu_timeout_s = num_cpu_timeout_secs, num_gpu_timeout_secs
        self.fabric = Fabric(group)
        group.barrier().wait()

    def destroy(self) -> None:
        assert self.explicitly_destroy

    @staticmethod
    def capture() -> EventHandle:
        return EventHandle()

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, Tensor, Tensor, EPHandle, EventOverlap]:
        if handle is not None or do_expand or use_tma_aligned_col_major_sf:
            raise NotImplementedError("the stand-in has neither cached handles nor expanded rows nor column-major scales")
        assert topk_idx is not None and topk_weights is not None and num_experts is not None
        values, scales = x if isinstance(x, tuple) else (x, None)
        most = self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
        self._check_streams(previous_event, allocate_on_comm_stream)
        self._check_dispatch(values, scales, topk_idx, topk_weights, num_experts, most)
        self.fabric.begin()
        num_local, alignment, topk = num_experts // self.num_ranks, expert_alignment or 1, topk_idx.shape[1]
        chosen = [self._chosen(topk_idx, rank * num_local, num_local) for rank in range(self.num_ranks)]
        rows = [self._pack(values, scales, ids, topk_weights, most) for ids in chosen]
        columns = [(values.shape[1], values.dtype), (topk, torch.int64), (topk, torch.float32), (1, torch.int32)]
        if scales is not None:
            columns.append((scales.shape[1], scales.dtype))

        synchronize = do_cpu_sync is None or do_cpu_sync
        counts = [self._counts(ids, num_local) for ids in chosen]
        received: list[int] = []
        if synchronize:
            arrived = self._await_counts(counts, rows)
            arriving = arrived[:, 0].tolist()
            received = [-(-count // alignment) * alignment for count in arrived[:, 1:].sum(0).tolist()]
            transfer, allocated = self.fabric.send(rows, arriving), sum(arriving)
        else:
            padded = [torch.cat([each, each.new_full((most - len(each), each.shape[1]), 255)]) for each in rows]
            transfer, allocated = self.fabric.send(padded), most * self.num_ranks

        recv_x = poisoned(allocated, values.shape[1], dtype=values.dtype)
        recv_scales = None if scales is None else poisoned(allocated, scales.shape[1], dtype=scales.dtype)
        recv_ids, recv_weights = poisoned(allocated, topk, dtype=torch.int64), poisoned(allocated, topk, dtype=torch.float32)
        metadata = poisoned(allocated, topk + 2, dtype=torch.int32)
        ranks_psum, experts_psum = poisoned(self.num_ranks, dtype=torch.int32), poisoned(num_local, dtype=torch.int32)
        snapshot = values.view(torch.uint8).clone()

        def fill() -> None:
            if not torch.equal(values.view(torch.uint8), snapshot):
                raise misuse("x was changed while an asynchronous dispatch was still reading it")
            blocks = self._wait(transfer.wait)
            if not synchronize:
                blocks = [block[: int((from_bytes(block, *columns)[3] >= 0).sum())] for block in blocks]
            parts = from_bytes(torch.cat(blocks), *columns)
            total = len(parts[0])
            recv_x[:total], recv_ids[:total], recv_weights[:total] = parts[:3]
            metadata[:total, 0] = parts[3].squeeze(1)
            if recv_scales is not None:
                recv_scales[:total] = parts[4]
            ranks_psum.copy_(torch.tensor([len(block) for block in blocks]).cumsum(0))
            per_expert = torch.bincount(parts[1].flatten() + 1, minlength=num_local + 1)[1:]
            experts_psum.copy_((-(-per_expert // alignment) * alignment).cumsum(0))

        handle = EPHandle(
            do_expand=False,
            num_experts=num_experts,
            expert_alignment=alignment,
            num_max_tokens_per_rank=most,
            num_sms=num_sms or DEFAULT_SMS,
            topk_idx=topk_idx.clone() if do_handle_copy else topk_idx,
            num_recv_tokens=allocated,
            num_recv_tokens_per_expert_list=received,
            psum_num_recv_tokens_per_scaleup_rank=ranks_psum,
            psum_num_recv_tokens_per_expert=experts_psum,
            recv_src_metadata=metadata,
        )
        out = recv_x if recv_scales is None else (recv_x, recv_scales)
        return out, recv_ids, recv_weights, handle, _finish(fill, async_with_compute_stream)

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        if topk_weights is not None or bias is not None:
            raise NotImplementedError("the stand-in combines rows alone")
        self._check_streams(previous_event, allocate_on_comm_stream)
        check_matrix(x, "x", torch.bfloat16, ELASTIC)
        host_assert(len(handle.recv_src_metadata) == len(x), "num_reduced_tokens == num_tokens", ELASTIC)
        psum = handle.psum_num_recv_tokens_per_scaleup_rank
        if bool((psum < 0).any()):
            raise misuse("combine before its dispatch was received")
        self.fabric.begin()
        num_local = handle.num_experts // self.num_ranks
        leaving = psum.diff(prepend=psum.new_zeros(1)).tolist()
        tokens = [
            (self._chosen(handle.topk_idx, rank * num_local, num_local) >= 0).any(1).nonzero().squeeze(1)
            for rank in range(self.num_ranks)
        ]
        sent = [as_bytes(rows) for rows in x[: int(psum[-1])].split(leaving)]
        transfer = self.fabric.send(sent, [len(of) for of in tokens])
        combined = poisoned(len(handle.topk_idx), x.shape[1], dtype=x.dtype)

        def fill() -> None:
            total = torch.zeros(combined.shape, dtype=torch.float32)
            for of, rows in zip(tokens, self._wait(transfer.wait), strict=True):
                total.index_add_(0, of, from_bytes(rows, (x.shape[1], x.dtype))[0].float())
            combined.copy_(total)

        return combined, None, _finish(fill, async_with_compute_stream)

    def _await_counts(self, counts: list[Tensor], rows: list[Tensor]) -> Tensor:
        """int64 [R, 1 + local experts] from each rank. The real one's error: 0 is not there yet, -n - 1 a count."""
        counting = self.fabric.send([as_bytes(each.unsqueeze(0)) for each in counts])

        def rest_of_it(counted: list[Tensor]) -> None:
            self.fabric.send(rows, torch.cat(counted).view(torch.int64)[:, 0].tolist()).wait(1000)

        try:
            return torch.cat(counting.wait(self.cpu_timeout_s, rest_of_it)).view(torch.int64)
        except LateError as late:
            words = [0 if rank in late.ranks else -1 for rank in range(self.num_ranks)]
            info = " ".join([*map(str, words), "#", *["0"] * (len(counts[0]) - 1)])
            message = f"CPU side received count (scaleup: {self.rank_idx}): {info} "
            raise RuntimeError(f"Dispatch CPU wait exception ({ELASTIC}:1): {message}") from None

    def _wait(self, wait: Callable[[float], list[Tensor]]) -> list[Tensor]:
        try:
            return wait(self.gpu_timeout_s)
        except LateError:
            raise RuntimeError("CUDA error: unspecified launch failure") from None

    def _pack(self, values: Tensor, scales: Tensor | None, ids: Tensor, topk_weights: Tensor, most: int) -> Tensor:
        tokens = (ids >= 0).any(1).nonzero().squeeze(1)
        ids = ids[tokens]
        columns = [values.view(torch.uint8)[tokens], ids, topk_weights[tokens].masked_fill(ids < 0, 0)]
        columns.append((tokens + self.rank_idx * most).int().unsqueeze(1))
        return as_bytes(*columns, *([] if scales is None else [scales[tokens]]))

    @staticmethod
    def _chosen(topk_idx: Tensor, first: int, num_local: int) -> Tensor:
        """Local ids of one rank's experts, -1 elsewhere."""
        ids = topk_idx - first
        return ids.masked_fill((ids < 0) | (ids >= num_local), -1)

    @staticmethod
    def _counts(ids: Tensor, num_local: int) -> Tensor:
        per_expert = torch.bincount(ids.flatten() + 1, minlength=num_local + 1)[1:]
        return torch.cat([(ids >= 0).any(1).sum().view(1), per_expert])

    def _check_dispatch(
        self, x: Tensor, scales: Tensor | None, topk_idx: Tensor, topk_weights: Tensor, num_experts: int, most: int
    ) -> None:
        check_matrix(x, "x", file=ELASTIC)
        host_assert(x.shape[1] * x.element_size() % 16 == 0, "(x.size(1) * x.element_size()) % sizeof(int4) == 0", ELASTIC)
        host_assert(len(x) <= most, "num_tokens <= num_max_tokens_per_rank", ELASTIC)
        host_assert(x.dtype == torch.bfloat16 or scales is not None, "x.scalar_type() == torch::kBFloat16", ELASTIC)
        host_assert(scales is None or (len(scales) == len(x) and scales.element_size() == 4), "sf->element_size() == 4", ELASTIC)
        check_matrix(topk_idx, "topk_idx", torch.int64, ELASTIC)
        check_matrix(topk_weights, "topk_weights", torch.float32, ELASTIC)
        host_assert(topk_idx.shape == topk_weights.shape and len(topk_idx) == len(x), "num_tokens == num_tokens_", ELASTIC)
        host_assert(num_experts % self.num_ranks == 0, "num_experts % nccl_context->num_ranks == 0", ELASTIC)
        num_bytes = self._size(most, x.shape[1], topk_idx.shape[1], scales is not None)
        host_assert(num_bytes <= self.num_bytes, "get_dispatch_buffer_size(...) <= num_buffer_bytes", ELASTIC)

    @staticmethod
    def _check_streams(previous_event: EventHandle | None, allocate_on_comm_stream: bool) -> None:
        if previous_event is not None:
            if not isinstance(previous_event, EventHandle):
                raise TypeError("incompatible function arguments: previous_event is an EventHandle")
            host_assert(allocate_on_comm_stream, "allocate_on_comm_stream", ELASTIC)
            previous_event.current_stream_wait()

    def _size(self, most: int, hidden: int, topk: int, fp8: bool) -> int:
        """Of ranks that reach each other over NVLink."""
        scales = -(-hidden // 32) * 4 if fp8 else 0
        dispatch = _up(hidden * (1 if fp8 else 2)) + _up(scales) + _up(topk * 8 + (1 + topk) * 4)
        combine = _up(2 * hidden) + _up(topk * 8)
        slots = min(self.num_ranks, topk) if self._reductions else topk
        return _up(most * max(self.num_ranks * dispatch, slots * combine), MEMORY_ALIGNMENT)


def _up(value: int, alignment: int = TMA_ALIGNMENT) -> int:
    return -(-value // alignment) * alignment


def _finish(fill: Callable[[], None], asynchronous: bool) -> EventOverlap:
    if asynchronous:
        return EventOverlap(EventHandle(fill))
    fill()
    return EventOverlap(None)
