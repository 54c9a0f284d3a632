"""Backend `deepep_v2`: DeepEP's second generation (`ElasticBuffer` over NCCL), in both dispatch modes.

The library has one dispatch, which sends each token once to each rank that holds any of its experts. Normal mode lets the CPU wait
for the counts (in dispatch_b) and gets just the rows that came. Low-latency mode does not wait: there is room for all tokens of all
ranks, what is filled is known on the device alone, and the masked layout is made of it there. Both ways a token's experts on a rank
give one weighted partial sum, which the library adds up over the ranks. Rows travel as bf16, to the experts also as FP8.

T tokens of this rank, R ranks, H hidden size, K choices per token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.quant import quantize_per_token
from moesaic.moe.communication import Communications, Waitable
from moesaic.moe.deepep_config import DeepEPSettings, ExchangeShape
from moesaic.moe.deepep_library import DeepEPError, explained, load
from moesaic.moe.deepep_rows import arrange_received
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan, Received, ReceivedHalf
from moesaic.moe.gate import TopK
from moesaic.moe.layouts import Arranged, ExpertLayout, weighted
from moesaic.moe.message import Message, behind


class ElasticDeepEPBuffer:
    """DeepEP's buffer for all layers of a model. Making it is collective.

    Raises DeepEPError when the library is missing or can't start.
    """

    def __init__(self, *, settings: DeepEPSettings, shape: ExchangeShape, group: dist.ProcessGroup, device: torch.device) -> None:
        library = load("deepep_v2")
        self.settings = settings
        self.shape = shape
        self.device = device
        self.num_sms = 0 if settings.dispatch is None else settings.dispatch.num_sms
        self._capture: Callable[[], Any] = library.ElasticBuffer.capture
        normal, fixed = settings.max_normal_tokens_per_rank, settings.max_tokens_per_rank
        self.max_tokens = max(normal * settings.normal, fixed * settings.low_latency)
        # torch makes a group's NCCL communicator at its first collective, and the library takes what is there.
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        with explained("start"):
            self.library = library.ElasticBuffer(
                group,
                num_max_tokens_per_rank=self.max_tokens,
                hidden=shape.hidden_size,
                num_topk=shape.topk,
                use_fp8_dispatch=settings.fp8,
                num_cpu_timeout_secs=settings.timeout_s,
                num_gpu_timeout_secs=settings.timeout_s,
            )

    def capture(self) -> Any:
        """An event after all work that was submitted so far."""
        return self._capture()

    def enter(self, mode: DispatchMode) -> None:
        """Nothing to prepare: all modes use the buffer alike."""

    def leave(self) -> None:
        """Nothing to ask for."""

    def verify(self) -> None:
        """Nothing to ask: what is late raises by itself."""


@dataclass(kw_only=True)
class ElasticHandle:
    """A dispatch: as it was asked for, then what the library needs for the way back. work: what is under way.

    sent: rows that the library may still be reading. ready: an event after which they are there.
    """

    mode: DispatchMode
    hidden: Tensor
    topk: TopK
    sent: Tensor | tuple[Tensor, Tensor]
    ready: Any
    received: tuple[Any, Tensor, Tensor] | None = None
    library: Any = None
    work: Waitable | None = None
    arranged: Arranged | None = None
    weights: Tensor | None = None
    combined: Tensor | None = None


class ElasticDeepEPDispatcher:
    """One layer's dispatcher over the model's buffer. fp8_rows: what travels as FP8 reaches the experts so."""

    def __init__(
        self, buffer: ElasticDeepEPBuffer, *, communications: Communications, alignment: int, fp8_rows: bool = False
    ) -> None:
        self._buffer = buffer
        self._communications = communications
        self._alignment = alignment
        self._rows_dtype = torch.float8_e4m3fn if fp8_rows else None

    def dispatch_a(self, hidden: Tensor, topk: TopK, plan: DispatchPlan) -> ElasticHandle:
        rows = hidden.to(torch.bfloat16).contiguous()
        handle = ElasticHandle(
            mode=plan.mode,
            hidden=hidden,
            topk=TopK(ids=topk.ids.contiguous(), weights=topk.weights.float().contiguous()),
            sent=quantize_per_token(rows) if self._buffer.settings.fp8 else rows,
            ready=self._buffer.capture(),
        )
        if plan.mode is DispatchMode.LOW_LATENCY:
            self._post("dispatch", handle, self._dispatch(handle), _rows(handle.sent))
        return handle

    def dispatch_b(self, handle: ElasticHandle) -> Received[ElasticHandle]:
        if handle.mode is DispatchMode.NORMAL:
            self._receive_counted(handle)
        else:
            _wait(handle)
        assert handle.received is not None, "dispatch_b comes after dispatch_a"
        (rows, ids, handle.weights), handle.received = handle.received, None
        if handle.mode is DispatchMode.LOW_LATENCY:
            ids = _filled(ids, handle.library.psum_num_recv_tokens_per_scaleup_rank)
        layout = ExpertLayout(mode=handle.mode, num_local=self._buffer.shape.num_local, alignment=self._alignment)
        handle.arranged, arranged = arrange_received(rows, ids, layout, self._rows_dtype or handle.hidden.dtype)
        return Received(rows=arranged, handle=handle)

    def halve(self, received: Received[ElasticHandle]) -> tuple[ReceivedHalf[ElasticHandle], ReceivedHalf[ElasticHandle]]:
        """Not built: DeepEP returns a dispatch as a whole. Flags that would ask for it are refused at start."""
        raise DeepEPError("DeepEP returns a dispatch as a whole: leave out --enable-single-batch-overlap")

    def combine_a(self, expert_rows: Tensor, handle: ElasticHandle) -> ElasticHandle:
        assert handle.arranged is not None and handle.weights is not None, "combine comes after dispatch"
        sums = weighted(expert_rows, handle.arranged.row_map, handle.weights).to(torch.bfloat16).contiguous()
        with explained("send a combine"):
            handle.combined, _, event = self._buffer.library.combine(
                sums,
                handle.library,
                previous_event=self._buffer.capture(),
                async_with_compute_stream=True,
                allocate_on_comm_stream=True,
            )
        handle.sent = sums
        self._post("combine", handle, event, sums)
        return handle

    def combine_b(self, handle: ElasticHandle) -> Tensor:
        _wait(handle)
        assert handle.combined is not None, "combine_b comes after combine_a"
        return handle.combined.to(handle.hidden.dtype)

    def _post(self, name: str, handle: ElasticHandle, event: Any, sent: Tensor) -> None:
        """What the library has submitted is under way until `event`."""

        def receive() -> None:
            with explained(f"receive a {name}"):
                event.current_stream_wait()

        message = Message(receive, self._buffer.device, event.current_stream_wait)
        handle.work = self._communications.mark(name, message, sent)

    def _receive_counted(self, handle: ElasticHandle) -> None:
        """Normal mode: rows and counts leave, and the CPU waits for what comes."""

        def receive() -> None:
            event = self._dispatch(handle)
            message.arrived = event.current_stream_wait
            with explained("receive a dispatch"):
                event.current_stream_wait()

        message = Message(receive, self._buffer.device)
        with behind(handle.ready.current_stream_wait, self._buffer.device):
            pending = self._communications.mark("dispatch", message, _rows(handle.sent))
        pending.wait()

    def _dispatch(self, handle: ElasticHandle) -> Any:
        """The library's call: what will have been received after the event that it returns. In normal mode the CPU waits in it."""
        buffer, fixed = self._buffer, handle.mode is DispatchMode.LOW_LATENCY
        with explained("dispatch", lambda words: _late_ranks(words, buffer.shape)):
            rows, ids, weights, handle.library, event = buffer.library.dispatch(
                handle.sent,
                topk_idx=handle.topk.ids,
                topk_weights=handle.topk.weights,
                num_experts=buffer.shape.num_slots,
                num_max_tokens_per_rank=buffer.settings.max_tokens_per_rank if fixed else buffer.max_tokens,
                expert_alignment=self._alignment,
                num_sms=buffer.num_sms,
                previous_event=handle.ready,
                async_with_compute_stream=True,
                allocate_on_comm_stream=True,
                do_cpu_sync=not fixed,
            )
        handle.received = (rows, ids, weights)
        return event


def _wait(handle: ElasticHandle) -> None:
    work, handle.work = handle.work, None
    assert work is not None, "nothing is under way"
    work.wait()


def _rows(sent: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Without their scales."""
    return sent[0] if isinstance(sent, tuple) else sent


def _filled(ids: Tensor, tokens_by_rank: Tensor) -> Tensor:
    """Local ids [M, K] with -1 in the rows past the last that came: their number is the last of tokens_by_rank, int32 [ranks]."""
    row = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    return torch.where(row < tokens_by_rank[-1], ids, -1)


def _late_ranks(words: str, shape: ExchangeShape) -> str | None:
    """Whom the CPU's wait for counts has not heard from: the library prints the raw counts, and 0 is one that is not there.

    Within a node counts are by rank; between nodes by the peer that forwards them.
    """
    found = re.search(r"CPU side received count \(scaleup: \d+\): ([-\d ]*)#", words)
    if found is None:
        return None
    late = [str(peer) for peer, count in enumerate(found[1].split()) if int(count) >= 0]
    if not late:
        return None
    what = "rank" if shape.num_nodes == 1 else "the node's own rank number"
    return f"{what}{'s' * (len(late) > 1)} {', '.join(late)}"
