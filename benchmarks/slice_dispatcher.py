"""The loopback dispatcher: one rank alone receives what it would receive among N, in both modes, behind the real protocol.

What arrives is the rank's own tokens, over and over: as many rows for each local expert as `slice_traffic.py` says. It does what a
rank does around DeepEP, and leaves to the wire what DeepEP's kernels do, whose time the published tables contain:

                 the rank, on its computation stream                the wire (slice_wire.py)
    normal       quantise T tokens to FP8; M received tokens        M tokens copied to the receive buffer (the CPU waits for it, as
                 to R expert rows; R outputs to M weighted sums     for DeepEP's counts); sums back, each token's added up
    low latency  nothing                                            quantise, R rows into the masked block [E_local, N * T, H];
                                                                    T tokens' weighted sums of K outputs each

Where each row lies is known from the start here; a real rank finds it out in microseconds of counting. Sizes, dtypes and layouts
are real; what the outputs say means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import bare_import  # noqa: F401  before anything of moesaic
import torch
from slice_arrivals import MaskedArrivals, TokenArrivals, masked_arrivals, token_arrivals
from slice_network import Direction
from slice_traffic import RankPlace
from slice_wire import Message, ValueT, Wire
from torch import Tensor

from moesaic.kernels.grouped_backends import BACKENDS, Name
from moesaic.kernels.permute import RowMap, to_rows, weighted_rows
from moesaic.kernels.quant import FP8, quantize_per_token
from moesaic.moe.communication import Communications, Pending
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import ContiguousRows, DispatchPlan, ExpertRows, MaskedRows, Received, ReceivedHalf
from moesaic.moe.gate import TopK

LAYER_PATTERNS = 4
"""Draws of what arrives; the sparse layers use them in turn."""

Counts = Callable[[int, int], list[int]]
"""(tokens per rank, pattern) -> rows of each local expert."""
Seconds = Callable[[Direction, DispatchMode, int], float]
"""(direction, mode, tokens per rank) -> how long the wire takes."""


@dataclass(kw_only=True)
class LoopbackGroup:
    """What all layers' dispatchers share: who this rank is, and (changed between steps only) what arrives and how long it takes.

    `seconds` may be set at any time between steps. runner: what computes the experts, which may want aligned rows.
    """

    place: RankPlace
    wire: Wire
    counts: Counts
    seconds: Seconds
    device: torch.device
    runner: Name = "torch"
    _known: dict[tuple[DispatchMode, int, int], MaskedArrivals | TokenArrivals] = field(default_factory=dict)

    def receive(self, counts: Counts) -> None:
        """What arrives from the next step on."""
        self.counts = counts
        self._known.clear()

    def arrivals(self, mode: DispatchMode, num_tokens: int, layer: int) -> MaskedArrivals | TokenArrivals:
        """Drawn when first asked for; later calls cost nothing."""
        pattern = layer % LAYER_PATTERNS
        key = mode, num_tokens, pattern
        if key not in self._known:
            counts = self.counts(num_tokens, pattern)
            if mode is DispatchMode.NORMAL:
                self._known[key] = token_arrivals(
                    self.place, counts, num_tokens, pattern, self.device, alignment=BACKENDS[self.runner].alignment
                )
            else:
                self._known[key] = masked_arrivals(self.place, counts, num_tokens, self.device)
        return self._known[key]


@dataclass(kw_only=True)
class LoopbackHandle:
    """A dispatch on its way. `held`: what the wire reads, kept until it has."""

    mode: DispatchMode
    arrivals: MaskedArrivals | TokenArrivals
    num_tokens: int
    topk: TopK
    held: tuple[Tensor, ...] = ()
    arrived: Message[tuple[Tensor, Tensor]] | None = None
    returned: Message[Tensor] | None = None


class LoopbackDispatcher:
    """Of one sparse layer, the `layer`-th."""

    def __init__(self, group: LoopbackGroup, layer: int, communications: Communications) -> None:
        self._group = group
        self._layer = layer
        self._communications = communications

    def dispatch_a(self, hidden: Tensor, topk: TopK, plan: DispatchPlan) -> LoopbackHandle:
        arrivals = self._group.arrivals(plan.mode, len(hidden), self._layer)
        handle = LoopbackHandle(mode=plan.mode, arrivals=arrivals, num_tokens=len(hidden), topk=topk)
        if isinstance(arrivals, MaskedArrivals):
            spread, handle.held = arrivals.spread, (hidden,)
            handle.arrived = self._send("dispatch", handle, lambda: _fill_block(hidden, spread), hidden)
        else:
            values, scales = quantize_per_token(hidden)
            source, handle.held = arrivals.source, (values, scales)
            handle.arrived = self._send("dispatch", handle, lambda: _take(values, scales, source), values)
        return handle

    def dispatch_b(self, handle: LoopbackHandle) -> Received[LoopbackHandle]:
        assert handle.arrived is not None, "dispatch_b comes after dispatch_a"
        if isinstance(handle.arrivals, MaskedArrivals):
            handle.arrived.wait()
            rows: ExpertRows = self._masked(handle.arrivals, handle.num_tokens, *handle.arrived.value())
        else:
            handle.arrived.wait_on_host()
            rows = _contiguous(handle.arrivals, *handle.arrived.value())
        handle.arrived, handle.held = None, ()
        return Received(rows=rows, handle=handle)

    def halve(self, received: Received[LoopbackHandle]) -> tuple[ReceivedHalf[LoopbackHandle], ReceivedHalf[LoopbackHandle]]:
        raise AssertionError("the loopback dispatcher does not halve")

    def combine_a(self, expert_rows: Tensor, handle: LoopbackHandle) -> LoopbackHandle:
        arrivals, back = handle.arrivals, handle.arrivals.back
        rows, weights = expert_rows.view(-1, expert_rows.shape[-1]), handle.topk.weights
        if isinstance(arrivals, TokenArrivals):
            rows, weights = weighted_rows(rows, arrivals.row_map, arrivals.weights), arrivals.back_weights
        handle.held = (rows, weights)
        handle.returned = self._send("combine", handle, lambda: weighted_rows(rows, back, weights), rows)
        return handle

    def combine_b(self, handle: LoopbackHandle) -> Tensor:
        assert handle.returned is not None, "combine_b comes after combine_a"
        handle.returned.wait()
        handle.held = ()
        return handle.returned.value()

    def _masked(self, arrivals: MaskedArrivals, num_tokens: int, values: Tensor, scales: Tensor) -> MaskedRows:
        place = self._group.place
        return MaskedRows(
            hidden=values.view(place.num_local, place.ep_size * num_tokens, -1),
            scales=scales.view(place.num_local, place.ep_size * num_tokens, -1),
            counts=arrivals.spread.counts,
            expected_rows=-(-sum(arrivals.counts) // place.num_local),
        )

    def _send(self, name: Direction, handle: LoopbackHandle, transfer: Callable[[], ValueT], sent: Tensor) -> Message[ValueT]:
        message = self._group.wire.send(transfer, self._group.seconds(name, handle.mode, handle.num_tokens))
        return Watched(message, self._communications.mark(name, message, sent))


class Watched(Generic[ValueT]):
    """A message whose waits go through `watched`, which a timeline may have put around it."""

    def __init__(self, message: Message[ValueT], watched: Pending) -> None:
        self._message = message
        self._watched = watched

    def wait(self) -> None:
        self._watched.wait()

    def wait_on_host(self) -> None:
        self._watched.wait()
        self._message.wait_on_host()

    def when_done(self, callback: Callable[[], None]) -> None:
        self._watched.when_done(callback)

    def value(self) -> ValueT:
        return self._message.value()


def _take(values: Tensor, scales: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """The received tokens: bytes [M, H] and scales [M, H / 128]."""
    return values.view(torch.uint8).index_select(0, source), scales.index_select(0, source)


def _contiguous(arrivals: TokenArrivals, values: Tensor, scales: Tensor) -> ContiguousRows:
    """Received tokens -> expert rows."""
    return ContiguousRows(
        hidden=to_rows(values, arrivals.row_map, zero_padding=False).view(FP8),
        scales=to_rows(scales, arrivals.row_map, zero_padding=False),
        counts=arrivals.counts,
    )


def _fill_block(hidden: Tensor, spread: RowMap) -> tuple[Tensor, Tensor]:
    """hidden [T, H] -> the masked block, e4m3 [rows, H] and scales [rows, H / 128]; only valid rows are written."""
    values, scales = quantize_per_token(hidden)
    return (
        to_rows(values.view(torch.uint8), spread, zero_padding=False).view(FP8),
        to_rows(scales, spread, zero_padding=False),
    )
