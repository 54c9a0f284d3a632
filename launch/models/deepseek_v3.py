"""DeepSeek-V3 on one rank: embedding, decoder layers as operations, final norm, head.

Knows no requests and no scheduling. The layers are in layers.py, the order of their operations in operations.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moesaic.attention.dp_attention import AttentionTPGroup, all_gather_rows
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.eplb.replica_choice import ReplicaChoice
from moesaic.kernels.norm import rms_norm
from moesaic.launch.models.failure_codes import FailureCodes
from moesaic.launch.models.forward import ForwardInput, ForwardSplit
from moesaic.launch.models.layers import DenseDecoderLayer, SparseDecoderLayer
from moesaic.launch.models.operations import DECODE, PREFILL, Schedules, SplitOrder
from moesaic.launch.models.parallel import ParallelContext
from moesaic.moe.communication import Communications
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.experts import ExpertWeights
from moesaic.overlap.executor import Schedule
from moesaic.overlap.operations import Failures, Operation, OperationError, Recorder, State

LoadObserver = Callable[[int, Tensor], None]
"""Called with (index of the sparse layer, topk_ids int64 [T, K]) of every sparse layer."""


class Exchange(Protocol):
    """What the dispatchers of all layers share, where their messages are not torch's collectives. It frames a forward, outside of
    what a graph may capture.
    """

    def enter(self, mode: DispatchMode) -> None:
        """Before a forward whose dispatches take this mode. Collective."""
        ...

    def leave(self) -> None:
        """After a forward: asks, without a wait, whether a rank was given up on in it."""
        ...

    def verify(self) -> None:
        """Once the device has been waited for: raises if a rank was given up on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Head:
    """Output projection [V / parts, H], split over the DP group's ranks, or (`over_world`) over all ranks of the instance."""

    weight: Tensor
    over_world: bool


class DeepseekV3:
    """The model of one rank; built by `DeepseekV3Builder`. `experts`: this rank's slots, sparse layer after sparse layer.

    `communications`: where all of a forward's communications are posted. `single_batch_overlap`: for steps that run straight.
    `exchange`: to be told before a forward and asked after it, where a backend has one.
    """

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
        communications: Communications,
        single_batch_overlap: bool,
        exchange: Exchange | None = None,
    ) -> None:
        self.experts = experts
        self.replicas = replicas
        self.communications = communications
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self._eps = eps
        self._head = head
        self._parallel = parallel
        self._group = group
        self._single_batch_overlap = single_batch_overlap
        self.exchange = exchange
        self.order_split_steps()

    def order_split_steps(self, *, prefill: SplitOrder = PREFILL, decode: SplitOrder = DECODE) -> None:
        """How two micro-batches share a step; other orders than operations.py's serve comparisons. All ranks alike."""
        self._schedules = Schedules(
            self._layers,
            before=Operation("embed", self._embed, blank=self._blank_embed),
            after=Operation("head", self._close, blank=None if self._head_communicates else self._blank_close),
            single_batch_overlap=self._single_batch_overlap,
            prefill=prefill,
            decode=decode,
        )
        self.failure_codes = FailureCodes(self._schedules.operations())

    @torch.inference_mode()
    def forward(
        self,
        inputs: ForwardInput,
        pool: LatentKVPool,
        observer: LoadObserver | None = None,
        split: ForwardSplit | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Logits fp32 [N, V] of the step's logit rows; writes the KV of all T rows. Collective: all ranks call it alike.

        `split`: the sparse layers run as two micro-batches in turns; the leading dense layers have nothing to overlap. Raises
        OperationError that names operation, layer, micro-batch and rank: not fatal, once all collectives of the forward have been
        completed; fatal, at once.
        """
        failures = Failures()
        try:
            logits = self._run(inputs, State(inputs=inputs, pool=pool, observer=observer), split, recorder, failures)
            if failures.first is not None:
                raise failures.first
        except OperationError as error:
            error.rank = self._parallel.rank
            raise
        return logits

    def _run(
        self, inputs: ForwardInput, state: State, split: ForwardSplit | None, recorder: Recorder | None, failures: Failures
    ) -> Tensor:
        schedules = self._schedules
        schedules.leading.run([state], recorder, failures)
        if split is None:
            schedules.straight.run([state], recorder, failures)
        else:
            _run_split(schedules.split(extends=split.extends), state, split, recorder, failures)
        schedules.closing.run([state], recorder, failures)
        logits: Tensor = state.take("logits")
        state.discard("inputs", "pool", "observer")
        state.finish()
        return logits

    @property
    def experts_per_token(self) -> int:
        """K of the choices that observers are shown; 0 without sparse layers."""
        sparse = (layer for layer in self._layers if isinstance(layer, SparseDecoderLayer))
        return next((layer.moe.gate.topk for layer in sparse), 0)

    @property
    def _head_communicates(self) -> bool:
        return self._head.over_world or self._group.size > 1

    def _embed(self, state: State) -> None:
        inputs: ForwardInput = state.peek("inputs")
        state.put("hidden", torch.nn.functional.embedding(inputs.input_ids, self._embedding))
        state.put("residual", None)

    def _close(self, state: State) -> None:
        inputs: ForwardInput = state.peek("inputs")
        hidden, residual = state.take("hidden"), state.take("residual")
        rows = (hidden + residual).index_select(0, inputs.logit_rows)
        normed = rms_norm(rows, self._final_norm, self._eps)
        state.put("logits", self._logits(normed, inputs.num_logits_per_dp_rank))

    def _blank_embed(self, state: State) -> None:
        state.replace("hidden", self._embedding.new_zeros(len(state.peek("inputs").input_ids), self._embedding.shape[1]))
        state.replace("residual", None)

    def _blank_close(self, state: State) -> None:
        state.discard("hidden", "residual")
        weight, inputs = self._head.weight, state.peek("inputs")
        state.replace("logits", weight.new_zeros(len(inputs.logit_rows), weight.shape[0], dtype=torch.float32))

    def _logits(self, hidden: Tensor, num_per_dp_rank: tuple[int, ...]) -> Tensor:
        if not self._head.over_world:
            part = torch.nn.functional.linear(hidden, self._head.weight)
            return self._group.gather_columns(part).float()
        return self._logits_over_world(hidden, num_per_dp_rank)

    def _logits_over_world(self, hidden: Tensor, num_per_dp_rank: tuple[int, ...]) -> Tensor:
        """Every rank sees all DP ranks' rows and computes its part of the vocabulary for them."""
        most = max(num_per_dp_rank)
        parallel, posted = self._parallel, self.communications
        if most == 0:
            return hidden.new_zeros(0, self._head.weight.shape[0] * parallel.world_size, dtype=torch.float32)
        padded = hidden.new_zeros(most, hidden.shape[1])
        padded[: hidden.shape[0]] = hidden
        everyone = all_gather_rows(padded, parallel.dp_group, parallel.dp_size, "head gather", posted)
        part = torch.nn.functional.linear(everyone, self._head.weight)
        parts = all_gather_rows(part, parallel.world_group, parallel.world_size, "vocabulary gather", posted)
        own = parts.view(parallel.world_size, *part.shape)[:, parallel.dp_rank * most :][:, : hidden.shape[0]]
        return torch.cat(own.unbind(0), dim=1).float()


def _run_split(schedule: Schedule, whole: State, split: ForwardSplit, recorder: Recorder | None, failures: Failures) -> None:
    """The sparse layers as two micro-batches: rows of the whole's state before the cut and from it on, and back."""
    hidden, residual = whole.take("hidden"), whole.take("residual")
    cut = len(split.first.input_ids)
    shared = {"pool": whole.peek("pool"), "observer": whole.peek("observer")}
    states = [
        State(hidden=hidden[rows], residual=None if residual is None else residual[rows], inputs=inputs, **shared)
        for inputs, rows in ((split.first, slice(cut)), (split.second, slice(cut, None)))
    ]
    schedule.run(states, recorder, failures)
    for name in ("hidden", "residual"):
        whole.put(name, torch.cat([state.take(name) for state in states]))
    for state in states:
        state.discard("inputs", "pool", "observer")
        state.finish()
