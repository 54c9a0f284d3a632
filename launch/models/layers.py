"""The decoder layers of DeepSeek-V3 as operations on a state; operations.py puts them in order.

Between layers every rank of a DP group holds the group's T hidden rows, [T, H]; inside a sparse layer with an all-to-all and
attention TP each rank holds its share of them. State: `hidden` [T, H] and `residual` [T, H] (None before the first layer) from one
layer to the next, and for all layers `inputs`, `pool` and `observer`. Normalised rows that only weights in FP8 take are in FP8
(`kernels/fp8_rows.py`). What an operation leaves when it fails is in blanks.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moesaic.attention.backend import AttentionBackend
from moesaic.attention.dp_attention import AttentionTPGroup
from moesaic.attention.mla import MultiHeadLatentAttention
from moesaic.kernels.fp8_rows import add_normed_rows, normed_rows
from moesaic.kernels.gemm import Rows
from moesaic.kernels.norm import add_rms_norm, rms_norm
from moesaic.launch.models.forward import ForwardInput
from moesaic.moe.gate import TopK
from moesaic.moe.layer import DenseMLP, SparseLayer
from moesaic.overlap.operations import State

if TYPE_CHECKING:
    from moesaic.launch.models.deepseek_v3 import LoadObserver


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """What every decoder layer has. Norm weights [H]."""

    index: int
    input_norm: Tensor
    post_norm: Tensor
    eps: float
    attention: MultiHeadLatentAttention
    backend: AttentionBackend
    group: AttentionTPGroup


def _normed(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, fp8: bool) -> tuple[Rows, Tensor]:
    """norm(x + residual), as FP8 rows or in x's dtype, and the sum."""
    if residual is None:
        return normed_rows(x, weight, eps) if fp8 else rms_norm(x, weight, eps), x
    return add_normed_rows(x, residual, weight, eps) if fp8 else add_rms_norm(x, residual, weight, eps)


class DecoderLayer:
    """Attention half of a layer. `feeds_fp8`: its feed-forward takes rows in FP8, and nobody else wants them."""

    feeds_fp8 = False

    def __init__(self, parts: LayerParts) -> None:
        self.parts = parts
        self.index = parts.index

    def attention_prepare(self, state: State) -> None:
        parts = self.parts
        hidden, residual = state.take("hidden"), state.take("residual")
        normed, residual = _normed(hidden, residual, parts.input_norm, parts.eps, fp8=parts.attention.takes_fp8)
        inputs: ForwardInput = state.peek("inputs")
        state.put("queries", parts.attention.prepare(normed, inputs.metadata, state.peek("pool")))
        state.put("residual", residual)

    def attention_core(self, state: State) -> None:
        parts = self.parts
        inputs: ForwardInput = state.peek("inputs")
        attended = parts.attention.core(state.take("queries"), inputs.metadata, state.peek("pool"), parts.backend)
        hidden = parts.group.all_reduce(parts.attention.output(attended))
        normed, residual = _normed(hidden, state.take("residual"), parts.post_norm, parts.eps, fp8=self.feeds_fp8)
        state.put("hidden", normed)
        state.put("residual", residual)


class DenseDecoderLayer(DecoderLayer):
    """A leading layer with an ordinary feed-forward, split over attention TP or whole on every rank."""

    def __init__(self, parts: LayerParts, mlp: DenseMLP, *, split: bool) -> None:
        super().__init__(parts)
        self._mlp = mlp
        self.split = split
        self.feeds_fp8 = mlp.takes_fp8

    def feed_forward(self, state: State) -> None:
        hidden = self._mlp(state.take("hidden"))
        state.put("hidden", self.parts.group.all_reduce(hidden) if self.split else hidden)


class SparseDecoderLayer(DecoderLayer):
    """A layer with routed experts. `scatter`: each attention-TP rank dispatches its own share of the rows.

    The experts run whole (`experts`, `combine_a`), or so that half of the outputs travels while the other half is computed
    (`gate_up`, `down_first`, `combine_a_first`, `down_second`, `combine_a_second`).
    """

    def __init__(self, parts: LayerParts, moe: SparseLayer, *, scatter: bool) -> None:
        super().__init__(parts)
        self.moe = moe
        self.scatter = scatter

    def gate(self, state: State) -> None:
        hidden = state.take("hidden")
        if self.scatter:
            hidden = self.parts.group.scatter(hidden)
        topk: TopK = self.moe.gate.select(hidden)
        inputs: ForwardInput = state.peek("inputs")
        if inputs.valid is not None:
            topk = topk.of_valid(self.parts.group.scatter(inputs.valid) if self.scatter else inputs.valid)
        observer: LoadObserver | None = state.peek("observer")
        if observer is not None:
            observer(self.moe.index, topk.ids)
        state.put("topk", self.moe.to_slots(topk))
        state.put("hidden", hidden)

    def dispatch_a(self, state: State) -> None:
        inputs: ForwardInput = state.peek("inputs")
        state.put("handle", self.moe.dispatcher.dispatch_a(state.peek("hidden"), state.take("topk"), inputs.plan))

    def dispatch_b(self, state: State) -> None:
        state.put("received", self.moe.dispatcher.dispatch_b(state.take("handle")))

    def experts(self, state: State) -> None:
        state.put("expert_rows", self.moe.experts.run(state.peek("received").rows))

    def combine_a(self, state: State) -> None:
        handle = state.take("received").handle
        state.put("handles", [self.moe.dispatcher.combine_a(state.take("expert_rows"), handle)])

    def gate_up(self, state: State) -> None:
        received = state.peek("received")
        state.put("inner", self.moe.experts.gate_up(received.rows))
        state.put("halves", self.moe.dispatcher.halve(received))

    def down_first(self, state: State) -> None:
        self._down(state, 0)

    def combine_a_first(self, state: State) -> None:
        first, _ = state.peek("halves")
        state.put("handles", [self.moe.dispatcher.combine_a(state.take("expert_rows"), first.handle)])

    def down_second(self, state: State) -> None:
        self._down(state, 1)

    def combine_a_second(self, state: State) -> None:
        state.discard("received", "inner")
        _, second = state.take("halves")
        state.peek("handles").append(self.moe.dispatcher.combine_a(state.take("expert_rows"), second.handle))

    def shared_expert(self, state: State) -> None:
        hidden = state.take("hidden")
        shared = None if self.moe.shared_expert is None else self.moe.shared_expert(hidden)
        if shared is not None and not self.scatter:
            shared = self.parts.group.all_reduce(shared)
        state.put("shared", shared)

    def combine_b(self, state: State) -> None:
        parts = [self.moe.dispatcher.combine_b(handle) for handle in state.take("handles")]
        state.put("hidden", parts[0] if len(parts) == 1 else torch.cat(parts))

    def output(self, state: State) -> None:
        hidden, shared = state.take("hidden"), state.take("shared")
        if shared is not None:
            hidden = hidden + shared
        if self.scatter:
            hidden = self.parts.group.gather(hidden, state.peek("residual").shape[0])
        state.put("hidden", hidden)

    def _down(self, state: State, half: int) -> None:
        state.put("expert_rows", self.moe.experts.down(state.peek("halves")[half].pick(state.peek("inner"))))
