"""The low-latency kernels of the first generation, over two buffers that take turns: a third result overwrites the first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_matrix, host_assert, misuse, poison, poisoned
from .config import low_latency_bytes
from .event import EventHandle, EventOverlap
from .fabric import Fabric, LateError, as_bytes, from_bytes

HIDDEN_SIZES = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
MAX_TOPK = 11
FP8_MAX, SMALLEST_AMAX = 448.0, 1e-4
KERNELS = "csrc/kernels/legacy/internode_ll.cu"


@dataclass
class Call:
    """One call under way or done; `results` are poisoned when its buffer is used anew."""

    what: str
    received: bool = False
    results: list[Tensor] = field(default_factory=list)


class LowLatencyKernels:
    gpu_timeout_s: float = 100.0
    fabric: Fabric
    group_size: int
    rank: int
    low_latency_mode: bool
    num_rdma_bytes: int
    num_qps_per_rank: int
    nvshmem_qp_depth: int

    def start_low_latency(self, enable_shrink: bool) -> None:
        self.dirty = False
        self._calls: deque[Call] = deque(maxlen=2)
        self._number = 0
        self._mask = torch.zeros(self.group_size, dtype=torch.int32) if enable_shrink else None

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        host_assert(self.low_latency_mode, "low_latency_mode")
        if any(not call.received for call in self._calls):
            raise misuse("clean_low_latency_buffer while a low-latency call has not been received")
        self.fabric.begin()
        self.fabric.barrier()
        self.dirty = False

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        host_assert(self._mask is not None, 'mask_buffer_ptr != nullptr and "Shrink mode must be enabled"')
        host_assert(mask_status.numel() == self.group_size and mask_status.dtype == torch.int32, "mask_status.numel() == num_ranks")
        mask_status.copy_(self._mask)

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, tuple[Any, ...], EventOverlap, Callable[[], None] | None]:
        if round_scale or use_ue8m0 or cumulative_local_expert_recv_stats is not None:
            raise NotImplementedError("the stand-in has fp32 scales and no statistics")
        room, hidden, topk = num_max_dispatch_tokens_per_rank, x.shape[1], topk_idx.shape[1]
        assert self.nvshmem_qp_depth >= (room + 1) * 2
        check_matrix(x, "x", torch.bfloat16)
        host_assert(hidden % 128 == 0, "x.size(1) % sizeof(int4) == 0 and x.size(1) % 128 == 0")
        check_matrix(topk_idx, "topk_idx", torch.int64)
        host_assert(len(x) == len(topk_idx) and len(x) <= room, "x.size(0) <= num_max_dispatch_tokens_per_rank")
        self._check_sizes(hidden, topk, room, num_experts, async_finish and return_recv_hook)
        host_assert(not use_fp8 or hidden % 512 == 0, "hidden % 512 == 0")
        num_local, call = num_experts // self.group_size, self._begin("dispatch")

        values, scales = _cast(x) if use_fp8 else (x, None)
        sent = []
        for rank in range(self.group_size):
            ids = topk_idx - rank * num_local
            ids = ids.masked_fill((ids < 0) | (ids >= num_local), -1)
            columns = [values.view(torch.uint8), ids, *([] if scales is None else [scales])]
            rows = as_bytes(*columns)
            padding = as_bytes(*(torch.full((room - len(x), *each.shape[1:]), -1).to(each.dtype) for each in columns))
            sent.append(torch.cat([rows, padding]))
        transfer = self.fabric.send(sent)

        count = poisoned(num_local, dtype=torch.int32)
        recv_x = poisoned(num_local, room * self.group_size, hidden, dtype=values.dtype)
        recv_scales = None
        if scales is not None:
            recv_scales = poisoned(num_local, hidden // 128, room * self.group_size, dtype=torch.float32).transpose(1, 2)
        source = poisoned(num_local, room * self.group_size, dtype=torch.int32)
        ranges = poisoned(num_local, self.group_size, dtype=torch.int64)
        call.results = [recv_x, count] if recv_scales is None else [recv_x, recv_scales, count]
        turn = self._number

        def receive() -> None:
            blocks = self._wait(call, transfer.wait)
            fill = [0] * num_local
            for step in range(self.group_size):  # in another order each time, as tokens arrive on a network
                rank = (step + turn) % self.group_size
                columns = [(hidden, values.dtype), (topk, torch.int64)]
                parts = from_bytes(blocks[rank], *columns, *([] if scales is None else [(hidden // 128, torch.float32)]))
                for expert in range(num_local):
                    tokens = (parts[1] == expert).any(1).nonzero().squeeze(1)
                    into = slice(fill[expert], fill[expert] + len(tokens))
                    recv_x[expert, into] = parts[0][tokens]
                    if recv_scales is not None:
                        recv_scales[expert, into] = parts[2][tokens]
                    source[expert, into] = tokens.int()
                    ranges[expert, rank] = fill[expert] << 32 | len(tokens)
                    fill[expert] += len(tokens)
            count.copy_(torch.tensor(fill, dtype=torch.int32))

        event, hook = self._finish(receive, async_finish, return_recv_hook)
        out = recv_x if recv_scales is None else (recv_x, recv_scales)
        return out, count, (source, ranges, room, hidden, num_experts), event, hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None] | None]:
        if use_logfmt or zero_copy or out is not None:
            raise NotImplementedError("the stand-in has neither LogFMT nor zero copy nor given outputs")
        source, ranges, room, hidden, num_experts = handle
        num_local = num_experts // self.group_size
        assert self.nvshmem_qp_depth >= (room + 1) * 2
        host_assert(
            x.dim() == 3 and x.is_contiguous() and x.dtype == torch.bfloat16, "x.dim() == 3 and x.scalar_type() == torch::kBFloat16"
        )
        host_assert(
            x.shape == (num_local, room * self.group_size, hidden), "x.size(1) == num_ranks * num_max_dispatch_tokens_per_rank"
        )
        check_matrix(topk_idx, "topk_idx", torch.int64)
        check_matrix(topk_weights, "topk_weights", torch.float32)
        host_assert(topk_idx.shape == topk_weights.shape, "topk_idx.size(0) == topk_weights.size(0)")
        self._check_sizes(hidden, topk_idx.shape[1], room, num_experts, async_finish and return_recv_hook)
        if bool((ranges < 0).any()):
            raise misuse("low_latency_combine before its dispatch was received")
        call = self._begin("combine")

        leaving = [_rows_of(x, source, ranges[:, rank]) for rank in range(self.group_size)]
        tokens, slots, order = _choices(topk_idx, num_experts)
        arriving = torch.bincount(order.div(num_local, rounding_mode="floor"), minlength=self.group_size).tolist()
        transfer = self.fabric.send(leaving, arriving)
        combined = poisoned(len(topk_idx), hidden, dtype=x.dtype)
        call.results = [combined]
        ids, weights = topk_idx.clone(), topk_weights.clone()

        def receive() -> None:
            rows = from_bytes(torch.cat(self._wait(call, transfer.wait)), (hidden, x.dtype))[0]
            choices = torch.zeros(*ids.shape, hidden)
            choices[tokens, slots] = rows.float()
            total = torch.zeros(len(ids), hidden)
            for slot in range(ids.shape[1]):  # in fp32 and in top-k order
                total += choices[:, slot] * weights[:, slot : slot + 1]
            combined.copy_(total)

        event, hook = self._finish(receive, async_finish, return_recv_hook)
        return combined, event, hook

    def _check_sizes(self, hidden: int, topk: int, room: int, num_experts: int, both: bool) -> None:
        host_assert(self.low_latency_mode, "low_latency_mode")
        host_assert(num_experts % self.group_size == 0, "num_experts % num_ranks == 0")
        host_assert(not both, "not(async and return_recv_hook)")
        host_assert(low_latency_bytes(room, hidden, num_experts) <= self.num_rdma_bytes, "layout.total_bytes <= num_rdma_bytes")
        host_assert(room * self.group_size % 4 == 0, '"TMA requires the number of tokens to be multiple of 4"')
        host_assert(topk <= MAX_TOPK, "num_topk <= kNumMaxTopK", KERNELS)
        host_assert(hidden in HIDDEN_SIZES, "Unsupported hidden", KERNELS)
        if self.num_qps_per_rank < num_experts // self.group_size:
            raise misuse(f"device assertion: num_rc_per_pe {self.num_qps_per_rank} >= num_local_experts")

    def _begin(self, what: str) -> Call:
        if self.dirty:
            raise misuse(f"low_latency_{what} on a buffer that normal kernels have used: clean_low_latency_buffer comes first")
        if len(self._calls) == 2:
            oldest = self._calls[0]
            if not oldest.received:
                raise misuse(f"low_latency_{what} is the third call alive: it overwrites a {oldest.what} that was not received")
            for result in oldest.results:
                poison(result)
        self.fabric.begin()
        self._number += 1
        self._calls.append(Call(what))
        return self._calls[-1]

    def _wait(self, call: Call, wait: Callable[[float], list[Tensor]]) -> list[Tensor]:
        if call.received:
            raise misuse(f"the hook of a {call.what} was called twice")
        call.received = True
        try:
            return wait(self.gpu_timeout_s)
        except LateError as late:
            print(f"Warning: DeepEP timeout for {call.what} receive, rank {self.rank}, src_rank {late.ranks}")
            if self._mask is None:
                raise RuntimeError("CUDA error: unspecified launch failure") from None
            self._mask[late.ranks] = 1
            raise _MaskedError from None

    @staticmethod
    def _finish(
        receive: Callable[[], None], async_finish: bool, return_recv_hook: bool
    ) -> tuple[EventOverlap, Callable[[], None] | None]:
        def run() -> None:
            try:
                receive()
            except _MaskedError:
                return  # what did not come is left out; who asks for the mask learns of it

        if return_recv_hook:
            return EventOverlap(None), run
        if async_finish:
            return EventOverlap(EventHandle(run)), None
        run()
        return EventOverlap(None), None


class _MaskedError(Exception):
    pass


def _cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """As the kernel casts: fp8 [T, H] and one fp32 scale for each 128 channels."""
    blocks = x.float().view(len(x), x.shape[1] // 128, 128)
    scales = blocks.abs().amax(2).clamp(min=SMALLEST_AMAX) / FP8_MAX
    return (blocks / scales.unsqueeze(2)).to(torch.float8_e4m3fn).view(x.shape), scales


def _rows_of(x: Tensor, source: Tensor, ranges: Tensor) -> Tensor:
    """The outputs for one rank's tokens, expert after expert, tokens in their order."""
    parts = [x[:0, 0]]
    for expert, word in enumerate(ranges.tolist()):
        into = slice(word >> 32, (word >> 32) + (word & 0xFFFFFFFF))
        parts.append(x[expert, into][source[expert, into].argsort()])
    return as_bytes(torch.cat(parts))


def _choices(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's choices in the order in which their outputs arrive: by expert, then by token. Tokens, slots and experts."""
    tokens, slots = (topk_idx >= 0).nonzero(as_tuple=True)
    experts = topk_idx[tokens, slots]
    order = (experts * (len(topk_idx) + 1) + tokens).argsort()
    return tokens[order], slots[order], experts[order]
