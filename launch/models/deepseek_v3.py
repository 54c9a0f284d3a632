"""DeepSeek-V3 on one rank: embedding, decoder layers as operations, final norm, head.

Knows no requests and no scheduling. Between layers every rank of a DP group holds the group's T hidden rows, [T, H]; inside a
sparse layer with an all-to-all and attention TP each rank holds its share of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.attention.backend import AttentionBackend
from moesaic.attention.dp_attention import AttentionTPGroup, all_gather_rows
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.mla import MultiHeadLatentAttention
from moesaic.eplb.replica_choice import ReplicaChoice
from moesaic.kernels.norm import add_rms_norm, rms_norm
from moesaic.launch.models.forward import ForwardInput, ForwardSplit
from moesaic.launch.models.operations import Schedules
from moesaic.launch.models.parallel import ParallelContext
from moesaic.moe.experts import ExpertWeights
from moesaic.moe.gate import TopK
from moesaic.moe.layer import DenseMLP, SparseLayer
from moesaic.overlap.executor import Schedule
from moesaic.overlap.operations import State

LoadObserver = Callable[[int, Tensor], None]
"""Called with (index of the sparse layer, topk_ids int64 [T, K]) of every sparse layer."""


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


class DecoderLayer:
    """Attention half of a layer. State: `hidden` [T, H] and `residual` [T, H] (None before the first layer)."""

    def __init__(self, parts: LayerParts) -> None:
        self._parts = parts
        self.index = parts.index

    def attention_prepare(self, state: State) -> None:
        parts = self._parts
        hidden, residual = state.take("hidden"), state.take("residual")
        if residual is None:
            normed, residual = rms_norm(hidden, parts.input_norm, parts.eps), hidden
        else:
            normed, residual = add_rms_norm(hidden, residual, parts.input_norm, parts.eps)
        inputs: ForwardInput = state.peek("inputs")
        state.put("queries", parts.attention.prepare(normed, inputs.metadata, state.peek("pool")))
        state.put("residual", residual)

    def attention_core(self, state: State) -> None:
        parts = self._parts
        inputs: ForwardInput = state.peek("inputs")
        attended = parts.attention.core(state.take("queries"), inputs.metadata, state.peek("pool"), parts.backend)
        hidden = parts.group.all_reduce(parts.attention.output(attended))
        normed, residual = add_rms_norm(hidden, state.take("residual"), parts.post_norm, parts.eps)
        state.put("hidden", normed)
        state.put("residual", residual)


class DenseDecoderLayer(DecoderLayer):
    """A leading layer with an ordinary feed-forward, split over attention TP or whole on every rank."""

    def __init__(self, parts: LayerParts, mlp: DenseMLP, *, split: bool) -> None:
        super().__init__(parts)
        self._mlp = mlp
        self._split = split

    def feed_forward(self, state: State) -> None:
        hidden = self._mlp(state.take("hidden"))
        state.put("hidden", self._parts.group.all_reduce(hidden) if self._split else hidden)


class SparseDecoderLayer(DecoderLayer):
    """A layer with routed experts. `scatter`: each attention-TP rank dispatches its own share of the rows."""

    def __init__(self, parts: LayerParts, moe: SparseLayer, *, scatter: bool) -> None:
        super().__init__(parts)
        self._moe = moe
        self._scatter = scatter

    def gate(self, state: State) -> None:
        hidden = state.take("hidden")
        if self._scatter:
            hidden = self._parts.group.scatter(hidden)
        topk: TopK = self._moe.gate.select(hidden)
        observer: LoadObserver | None = state.peek("observer")
        if observer is not None:
            observer(self._moe.index, topk.ids)
        state.put("topk", self._moe.to_slots(topk))
        state.put("hidden", hidden)

    def dispatch_a(self, state: State) -> None:
        inputs: ForwardInput = state.peek("inputs")
        state.put("handle", self._moe.dispatcher.dispatch_a(state.peek("hidden"), state.take("topk"), inputs.plan))

    def dispatch_b(self, state: State) -> None:
        state.put("received", self._moe.dispatcher.dispatch_b(state.take("handle")))

    def experts(self, state: State) -> None:
        state.put("expert_rows", self._moe.experts.run(state.peek("received").rows))

    def combine_a(self, state: State) -> None:
        handle = state.take("received").handle
        state.put("handle", self._moe.dispatcher.combine_a(state.take("expert_rows"), handle))

    def shared_expert(self, state: State) -> None:
        hidden = state.take("hidden")
        shared = None if self._moe.shared_expert is None else self._moe.shared_expert(hidden)
        if shared is not None and not self._scatter:
            shared = self._parts.group.all_reduce(shared)
        state.put("shared", shared)

    def combine_b(self, state: State) -> None:
        state.put("hidden", self._moe.dispatcher.combine_b(state.take("handle")))

    def output(self, state: State) -> None:
        hidden, shared = state.take("hidden"), state.take("shared")
        if shared is not None:
            hidden = hidden + shared
        if self._scatter:
            hidden = self._parts.group.gather(hidden, state.peek("residual").shape[0])
        state.put("hidden", hidden)


@dataclass(frozen=True, kw_only=True)
class Head:
    """Output projection [V / parts, H], split over the DP group's ranks, or (`over_world`) over all ranks of the instance."""

    weight: Tensor
    over_world: bool


class DeepseekV3:
    """The model of one rank; built by `DeepseekV3Builder`. `experts`: this rank's slots, sparse layer after sparse layer."""

    def __init__(
        self,
        *,
        embedding: Tensor,
        layers: list[DenseDecoderLayer | SparseDecoderLayer],
        final_norm: Tensor,
        eps: float,
        head: Head,
        parallel: ParallelContext,
        group: AttentionTPGroup,
        experts: list[ExpertWeights],
        replicas: ReplicaChoice | None,
    ) -> None:
        self.experts = experts
        self.replicas = replicas
        self._embedding = embedding
        self._schedules = Schedules(
            [layer for layer in layers if isinstance(layer, DenseDecoderLayer)],
            [layer for layer in layers if isinstance(layer, SparseDecoderLayer)],
        )
        self._final_norm = final_norm
        self._eps = eps
        self._head = head
        self._parallel = parallel
        self._group = group

    @torch.inference_mode()
    def forward(
        self,
        inputs: ForwardInput,
        pool: LatentKVPool,
        observer: LoadObserver | None = None,
        split: ForwardSplit | None = None,
    ) -> Tensor:
        """Logits fp32 [N, V] of the step's logit rows; writes the KV of all T rows. Collective: all ranks call it alike.

        `split`: the sparse layers run as two micro-batches in turns; the leading dense layers have nothing to overlap.
        """
        hidden: Tensor = torch.nn.functional.embedding(inputs.input_ids, self._embedding)
        residual: Tensor | None = None

        def state(part: ForwardInput, rows: slice) -> State:
            return State(
                hidden=hidden[rows],
                residual=None if residual is None else residual[rows],
                inputs=part,
                pool=pool,
                observer=observer,
            )

        hidden, residual = _run(self._schedules.leading, state(inputs, slice(None)))
        if split is None:
            hidden, residual = _run(self._schedules.straight, state(inputs, slice(None)))
        else:
            cut = len(split.first.input_ids)
            halves = (state(split.first, slice(cut)), state(split.second, slice(cut, None)))
            hidden, residual = _run(self._schedules.split(extends=split.extends), *halves)
        assert residual is not None, "a model has layers"
        rows = (hidden + residual).index_select(0, inputs.logit_rows)
        return self._logits(rms_norm(rows, self._final_norm, self._eps), inputs.num_logits_per_dp_rank)

    def _logits(self, hidden: Tensor, num_per_dp_rank: tuple[int, ...]) -> Tensor:
        if not self._head.over_world:
            part = torch.nn.functional.linear(hidden, self._head.weight)
            return self._group.gather_columns(part).float()
        return self._logits_over_world(hidden, num_per_dp_rank)

    def _logits_over_world(self, hidden: Tensor, num_per_dp_rank: tuple[int, ...]) -> Tensor:
        """Every rank sees all DP ranks' rows and computes its part of the vocabulary for them."""
        most = max(num_per_dp_rank)
        parallel = self._parallel
        if most == 0:
            return hidden.new_zeros(0, self._head.weight.shape[0] * parallel.world_size, dtype=torch.float32)
        padded = hidden.new_zeros(most, hidden.shape[1])
        padded[: hidden.shape[0]] = hidden
        everyone = all_gather_rows(padded, parallel.dp_group, parallel.dp_size)
        part = torch.nn.functional.linear(everyone, self._head.weight)
        parts = all_gather_rows(part, parallel.world_group, parallel.world_size).view(parallel.world_size, *part.shape)
        own = parts[:, parallel.dp_rank * most :][:, : hidden.shape[0]]
        return torch.cat(own.unbind(0), dim=1).float()


def _run(schedule: Schedule, *states: State) -> tuple[Tensor, Tensor | None]:
    """Hidden rows and residual after a schedule, those of several micro-batches one below the other."""
    schedule.run(states)
    hidden = [state.take("hidden") for state in states]
    residual = [state.take("residual") for state in states]
    for state in states:
        for name in ("inputs", "pool", "observer"):
            state.take(name)
        state.finish()
    if len(states) == 1:
        return hidden[0], residual[0]
    return torch.cat(hidden), torch.cat(residual)
