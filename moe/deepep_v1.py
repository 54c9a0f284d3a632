"""Backend `deepep`: DeepEP's first generation (`Buffer`), NVLink within a node and NVSHMEM between nodes, in both dispatch modes.

Normal mode sends each token once to each rank that holds any of its experts; the CPU waits for the counts in dispatch_b, and what
this rank's experts made of a token goes back as one weighted partial sum, added up in bf16 rows and fp32 sums by the library.
Low-latency mode sends in dispatch_a and combine_a and receives in dispatch_b and combine_b (receive hooks: no SM is busy between),
in fixed blocks whose counts stay on the device; the library weights. At most two low-latency results are alive at once, which every
order of operations in launch/models/operations.py keeps. Rows travel as bf16, to the experts also as FP8.

T tokens of this rank, R ranks, H hidden size, K choices per token.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.quant import quantize_per_token
from moesaic.moe.communication import Communications, Waitable
from moesaic.moe.deepep_config import DeepEPSettings, ExchangeShape, recommended_combine, recommended_dispatch
from moesaic.moe.deepep_library import DeepEPError, explained, load
from moesaic.moe.deepep_memory import DEFAULT_QP_DEPTH, plan_buffers
from moesaic.moe.deepep_rows import arrange_received, as_masked
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan, Received, ReceivedHalf
from moesaic.moe.gate import TopK
from moesaic.moe.layouts import Arranged, ExpertLayout, weighted
from moesaic.moe.message import Message, behind

_QP_DEPTH = "NVSHMEM_QP_DEPTH"


class DeepEPBuffer:
    """DeepEP's buffer with what it needs to know between calls: one for all layers of a model. Making it is collective.

    Raises DeepEPError when the library is missing or can't start.
    """

    def __init__(self, *, settings: DeepEPSettings, shape: ExchangeShape, group: dist.ProcessGroup, device: torch.device) -> None:
        library = load("deepep")
        self.settings = settings
        self.shape = shape
        self.device = device
        self._capture: Callable[[], Any] = library.Buffer.capture
        plan = plan_buffers("deepep", settings, shape)
        if plan.qp_depth:
            _settle_qp_depth(plan.qp_depth, 2 * (settings.max_tokens_per_rank * settings.low_latency + 1))
        # Always said in each call: what DeepEP takes otherwise depends on a number of SMs that is global to the process.
        self.dispatch_config, self.combine_config = _tuning(library, settings, shape.num_ranks)
        options: dict[str, Any] = {}
        # Tells which ranks were late instead of killing the process; releases before 1.2 don't have it.
        if settings.low_latency and "enable_shrink" in inspect.signature(library.Buffer.__init__).parameters:
            options["enable_shrink"] = True
        if plan.num_qps_per_rank:
            options["num_qps_per_rank"] = plan.num_qps_per_rank
        with explained("start"):
            self.library = library.Buffer(
                group, plan.num_nvl_bytes, plan.num_rdma_bytes, low_latency_mode=settings.low_latency, **options
            )
        self._masked = torch.zeros(shape.num_ranks, dtype=torch.int32, device=device) if "enable_shrink" in options else None
        self._seen = torch.zeros(shape.num_ranks, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._used_normally = False

    def capture(self) -> Any:
        """An event after all work that was submitted so far."""
        return self._capture()

    def enter(self, mode: DispatchMode) -> None:
        """Before a call in this mode: normal kernels leave the low-latency buffer dirty. Collective when the mode changes."""
        if mode is DispatchMode.NORMAL:
            self._used_normally = True
        elif self._used_normally:
            with explained("clean the low-latency buffer"):
                self.library.clean_low_latency_buffer(
                    self.settings.max_tokens_per_rank, self.shape.hidden_size, self.shape.num_slots
                )
            self._used_normally = False

    def receive(self, hook: Callable[[], None], doing: str) -> None:
        """Call a receive hook. On a CPU whom it has not heard from is known at once; on a GPU `verify` asks at the step's end."""
        with explained(doing):
            hook()
        if self.device.type == "cpu":
            self.leave()
            self.verify(doing)

    def leave(self) -> None:
        """Asks, without a wait, whose low-latency messages were given up."""
        if self._masked is not None:
            with explained("say who was late"):
                self.library.low_latency_query_mask_buffer(self._masked)
            self._seen.copy_(self._masked, non_blocking=True)

    def verify(self, doing: str = "receive") -> None:
        """Once the device has been waited for: raises DeepEPError that names the ranks whose messages were given up."""
        late = self._seen.nonzero().flatten().tolist()
        if late:
            names = ", ".join(map(str, late))
            raise DeepEPError(f"DeepEP failed to {doing}: not heard from rank{'s' * (len(late) > 1)} {names} within its deadline")


@dataclass(kw_only=True)
class DeepEPHandle:
    """A dispatch: as it was asked for, then what the library needs for the way back.

    num_tokens: of all ranks. sent: rows that the library may still be reading. work: what is under way.
    """

    mode: DispatchMode
    hidden: Tensor
    topk: TopK
    num_tokens: int
    sent: Tensor | tuple[Tensor, Tensor]
    layout: Any = None
    library: Any = None
    rows: Any = None
    counts: Tensor | None = None
    work: Waitable | None = None
    arranged: Arranged | None = None
    weights: Tensor | None = None
    combined: Tensor | None = None


class DeepEPDispatcher:
    """One layer's dispatcher over the model's buffer. fp8_rows: what travels as FP8 reaches the experts so."""

    def __init__(self, buffer: DeepEPBuffer, *, communications: Communications, alignment: int, fp8_rows: bool = False) -> None:
        self._buffer = buffer
        self._communications = communications
        self._alignment = alignment
        self._rows_dtype = torch.float8_e4m3fn if fp8_rows else None
        self._fp8 = buffer.settings.fp8
        self.device = buffer.device

    def dispatch_a(self, hidden: Tensor, topk: TopK, plan: DispatchPlan) -> DeepEPHandle:
        rows = hidden.to(torch.bfloat16).contiguous()
        topk = TopK(ids=topk.ids.contiguous(), weights=topk.weights.float().contiguous())
        handle = DeepEPHandle(mode=plan.mode, hidden=hidden, topk=topk, sent=rows, num_tokens=sum(plan.num_tokens_per_rank))
        self._buffer.enter(plan.mode)
        if plan.mode is DispatchMode.LOW_LATENCY:
            self._send_fixed(handle, rows)
        else:
            handle.sent = quantize_per_token(rows) if self._fp8 else rows
            with explained("count a dispatch"):
                handle.layout = self._buffer.library.get_dispatch_layout(
                    topk.ids,
                    self._buffer.shape.num_slots,
                    previous_event=self._buffer.capture(),
                    async_finish=True,
                    allocate_on_comm_stream=True,
                )
        return handle

    def dispatch_b(self, handle: DeepEPHandle) -> Received[DeepEPHandle]:
        if handle.mode is DispatchMode.LOW_LATENCY:
            _wait(handle)
            assert handle.counts is not None, "dispatch_b comes after dispatch_a"
            expected = -(-handle.num_tokens * handle.topk.ids.shape[1] // self._buffer.shape.num_slots)
            rows = as_masked(handle.rows, handle.counts, self._rows_dtype or handle.hidden.dtype, expected)
            return Received(rows=rows, handle=handle)
        received, ids, handle.weights = self._receive_counted(handle)
        layout = ExpertLayout(mode=handle.mode, num_local=self._buffer.shape.num_local, alignment=self._alignment)
        handle.arranged, arranged = arrange_received(received, ids, layout, self._rows_dtype or handle.hidden.dtype)
        return Received(rows=arranged, handle=handle)

    def halve(self, received: Received[DeepEPHandle]) -> tuple[ReceivedHalf[DeepEPHandle], ReceivedHalf[DeepEPHandle]]:
        """Not built: DeepEP returns a dispatch as a whole. Flags that would ask for it are refused at start."""
        raise DeepEPError("DeepEP returns a dispatch as a whole: leave out --enable-single-batch-overlap")

    def combine_a(self, expert_rows: Tensor, handle: DeepEPHandle) -> DeepEPHandle:
        self._buffer.enter(handle.mode)
        if handle.mode is DispatchMode.LOW_LATENCY:
            outputs = expert_rows.to(torch.bfloat16).contiguous()
            with explained("send a combine"):
                handle.combined, _, hook = self._buffer.library.low_latency_combine(
                    outputs, handle.topk.ids, handle.topk.weights, handle.library, return_recv_hook=True
                )
            handle.work = self._post_hook("combine", hook, outputs)
            return handle
        assert handle.arranged is not None and handle.weights is not None, "combine comes after dispatch"
        sums = weighted(expert_rows, handle.arranged.row_map, handle.weights).to(torch.bfloat16).contiguous()
        with explained("send a combine"):
            handle.combined, _, event = self._buffer.library.combine(
                sums,
                handle.library,
                config=self._buffer.combine_config,
                previous_event=self._buffer.capture(),
                async_finish=True,
                allocate_on_comm_stream=True,
            )
        handle.sent = sums
        message = Message(_explained(event.current_stream_wait, "receive a combine"), self.device, event.current_stream_wait)
        handle.work = self._communications.mark("combine", message, sums)
        return handle

    def combine_b(self, handle: DeepEPHandle) -> Tensor:
        _wait(handle)
        assert handle.combined is not None, "combine_b comes after combine_a"
        return handle.combined.to(handle.hidden.dtype)

    def _send_fixed(self, handle: DeepEPHandle, rows: Tensor) -> None:
        settings, shape = self._buffer.settings, self._buffer.shape
        with explained("send a dispatch"):
            handle.rows, handle.counts, handle.library, _, hook = self._buffer.library.low_latency_dispatch(
                rows, handle.topk.ids, settings.max_tokens_per_rank, shape.num_slots, use_fp8=self._fp8, return_recv_hook=True
            )
        handle.work = self._post_hook("dispatch", hook, rows)

    def _post_hook(self, name: str, hook: Callable[[], None], sent: Tensor) -> Waitable:
        message = Message(lambda: self._buffer.receive(hook, f"receive a {name}"), self.device)
        return self._communications.mark(name, message, sent)

    def _receive_counted(self, handle: DeepEPHandle) -> tuple[Any, Tensor, Tensor]:
        """The rows (or FP8 rows and scales) that came to this rank, local ids int64 [M, K] (-1: elsewhere), weights fp32 [M, K].

        They leave when their counts are there, which were begun in dispatch_a.
        """
        received: list[tuple[Any, Tensor, Tensor]] = []

        def receive() -> None:
            rows, event = self._dispatch_counted(handle)
            message.arrived = event.current_stream_wait
            with explained("receive a dispatch"):
                event.current_stream_wait()
            received.append(rows)

        message = Message(receive, self.device)
        sent = handle.sent[0] if isinstance(handle.sent, tuple) else handle.sent
        with behind(handle.layout[-1].current_stream_wait, self.device):
            pending = self._communications.mark("dispatch", message, sent)
        pending.wait()
        return received[0]

    def _dispatch_counted(self, handle: DeepEPHandle) -> tuple[tuple[Any, Tensor, Tensor], Any]:
        """The library's call, in which the CPU waits: what will have been received after the event."""
        per_rank, per_node, per_expert, in_rank, counted = handle.layout
        with explained("dispatch"):
            received, ids, weights, _, handle.library, event = self._buffer.library.dispatch(
                handle.sent,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=handle.topk.ids,
                topk_weights=handle.topk.weights,
                expert_alignment=self._alignment,
                config=self._buffer.dispatch_config,
                previous_event=counted,
                async_finish=True,
                allocate_on_comm_stream=True,
            )
        return (received, ids, weights), event


def _wait(handle: DeepEPHandle) -> None:
    work, handle.work = handle.work, None
    assert work is not None, "nothing is under way"
    work.wait()


def _explained(wait: Callable[[], None], doing: str) -> Callable[[], None]:
    def told() -> None:
        with explained(doing):
            wait()

    return told


def _tuning(library: Any, settings: DeepEPSettings, num_ranks: int) -> tuple[Any, Any]:
    """What the normal dispatch and combine are called with; nothing where no step is normal."""
    if not settings.normal:
        return None, None
    sizes = (settings.dispatch or recommended_dispatch(num_ranks), settings.combine or recommended_combine(num_ranks))
    dispatch, combine = (library.Config(**asdict(each)) for each in sizes)
    return dispatch, combine


def _settle_qp_depth(planned: int, least: int) -> None:
    """NVSHMEM reads its queues' depth from the environment. Raises DeepEPError when it was set too low on purpose."""
    given = os.environ.get(_QP_DEPTH)
    if given is None:
        if planned > DEFAULT_QP_DEPTH:
            os.environ[_QP_DEPTH] = str(planned)
    elif not given.isdigit() or int(given) < least:
        raise DeepEPError(f"{_QP_DEPTH}={given}: this many tokens per rank need {least} or more; unset it, or set it to {planned}")
