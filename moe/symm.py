"""Backend `symm`: in low-latency mode the ranks of a node write FP8 tokens and bf16 results straight into each other's memory.

The kernels are those of kernels/peer_exchange.py: no collective, no CPU wait, fixed shapes, so that a graph can hold a step. Steps
of normal mode go through another dispatcher. Compiled for Hopper and run in the interpreter, not on hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moesaic.kernels.peer_exchange import Dispatched, PeerWindow
from moesaic.moe.all_to_all import AllToAllDispatcher, AllToAllHandle
from moesaic.moe.communication import Communications, Waitable
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan, MaskedRows, Received, ReceivedHalf
from moesaic.moe.gate import TopK
from moesaic.moe.message import Message
from moesaic.moe.symm_windows import WindowsInTurn


class PeerExchange(Protocol):
    """What does the exchange: the module kernels.triton.peer_exchange."""

    def dispatch_send(self, hidden: Tensor, topk_ids: Tensor, window: PeerWindow) -> None: ...

    def dispatch_receive(self, window: PeerWindow) -> Dispatched: ...

    def combine_send(self, expert_rows: Tensor, dispatched: Dispatched, window: PeerWindow) -> None: ...

    def combine_receive(self, topk_ids: Tensor, weights: Tensor, window: PeerWindow) -> Tensor: ...


def triton_exchange() -> PeerExchange:
    """The kernels; imported when they are wanted, for not every machine has Triton."""
    from moesaic.kernels.triton import peer_exchange

    return peer_exchange


@dataclass(kw_only=True)
class SymmHandle:
    """A low-latency exchange in `window`. expected_rows: received by an expert, on average. work: what is under way."""

    window: PeerWindow
    topk: TopK
    expected_rows: int
    work: Waitable | None = None
    dispatched: Dispatched | None = None
    sums: Tensor | None = None


Handle = SymmHandle | AllToAllHandle


class SymmDispatcher:
    """`windows`: shared by the layers of a model, of a layout that fits its steps. `normal`: for steps of normal mode."""

    def __init__(
        self, *, windows: WindowsInTurn, exchange: PeerExchange, normal: AllToAllDispatcher, communications: Communications
    ) -> None:
        self._windows, self._exchange, self._normal = windows, exchange, normal
        self._communications = communications

    def dispatch_a(self, hidden: Tensor, topk: TopK, plan: DispatchPlan) -> Handle:
        if plan.mode is DispatchMode.NORMAL:
            return self._normal.dispatch_a(hidden, topk, plan)
        window, ids = self._windows.take(), topk.ids.contiguous()
        num_choices = sum(plan.num_tokens_per_rank) * ids.shape[1]
        expected = max(1, -(-num_choices // window.layout.num_experts))
        handle = SymmHandle(window=window, topk=TopK(ids=ids, weights=topk.weights.contiguous()), expected_rows=expected)
        self._exchange.dispatch_send(hidden.contiguous(), ids, window)

        def receive() -> None:
            handle.dispatched = self._exchange.dispatch_receive(window)

        handle.work = self._communications.mark("dispatch", Message(receive, hidden.device), hidden)
        return handle

    def dispatch_b(self, handle: Handle) -> Received[Handle]:
        if isinstance(handle, AllToAllHandle):
            received = self._normal.dispatch_b(handle)
            return Received(rows=received.rows, handle=received.handle)
        _wait(handle)
        got = handle.dispatched
        assert got is not None, "a dispatch leaves what was received"
        rows = MaskedRows(hidden=got.x, counts=got.counts, scales=got.scales, expected_rows=handle.expected_rows)
        return Received(rows=rows, handle=handle)

    def halve(self, received: Received[Handle]) -> tuple[ReceivedHalf[Handle], ReceivedHalf[Handle]]:
        raise AssertionError("outputs that return in halves are refused with this backend")

    def combine_a(self, expert_rows: Tensor, handle: Handle) -> Handle:
        if isinstance(handle, AllToAllHandle):
            return self._normal.combine_a(expert_rows, handle)
        assert handle.dispatched is not None, "combine comes after dispatch"
        self._exchange.combine_send(expert_rows, handle.dispatched, handle.window)

        def receive() -> None:
            handle.sums = self._exchange.combine_receive(handle.topk.ids, handle.topk.weights, handle.window)

        handle.work = self._communications.mark("combine", Message(receive, expert_rows.device), expert_rows)
        return handle

    def combine_b(self, handle: Handle) -> Tensor:
        if isinstance(handle, AllToAllHandle):
            return self._normal.combine_b(handle)
        _wait(handle)
        assert handle.sums is not None, "a combine leaves its sums"
        self._windows.give_back(handle.window)
        return handle.sums


def _wait(handle: SymmHandle) -> None:
    work, handle.work = handle.work, None
    assert work is not None, "nothing is under way"
    work.wait()
