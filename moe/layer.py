"""The parts of a sparse layer; the model strings their stages together (and overlap may put other work between them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.eplb.replica_choice import ReplicaChoice
from moesaic.kernels.activation import swiglu
from moesaic.kernels.fp8_rows import swiglu_rows
from moesaic.kernels.gemm import Matrix, Rows, is_fp8, linear
from moesaic.moe.dispatcher import Dispatcher
from moesaic.moe.experts import ExpertRunner
from moesaic.moe.gate import Gate, TopK


@dataclass(frozen=True, kw_only=True)
class DenseMLP:
    """SwiGLU feed-forward, or a TP shard of one: gate_up [2 * I, H] (gate first), down [H, I]. Gives the shard's partial sum.

    With weights in FP8, rows may come in FP8, and those between the products are made so by the kernel of the activation.
    """

    gate_up: Matrix
    down: Matrix
    fp8_activations: bool = False

    @property
    def takes_fp8(self) -> bool:
        """Whether rows had best come in FP8."""
        return is_fp8(self.gate_up)

    def __call__(self, hidden: Rows) -> Tensor:
        both = linear(hidden, self.gate_up, fp8_activations=self.fp8_activations)
        inner = swiglu_rows(both) if is_fp8(self.down) else swiglu(both)
        return linear(inner, self.down, fp8_activations=self.fp8_activations)


@dataclass(frozen=True, kw_only=True)
class SparseLayer:
    """Gate, dispatcher, experts and the shared expert (None when a model has none) of one layer.

    `index` among the sparse layers. `replicas`: logical experts to slots (None: a slot's number is its expert's), which
    asks the other ranks if `replicas_communicate`. `num_slots` of all ranks.
    """

    index: int
    num_slots: int
    gate: Gate
    replicas: ReplicaChoice | None
    replicas_communicate: bool
    dispatcher: Dispatcher[Any]
    experts: ExpertRunner
    shared_expert: DenseMLP | None

    def to_slots(self, topk: TopK) -> TopK:
        """Logical experts to the slots that this rank's tokens go to."""
        if self.replicas is None:
            return topk
        return TopK(ids=self.replicas.select(self.index, topk.ids), weights=topk.weights)

    def blank_topk(self, num_tokens: int, device: torch.device) -> TopK:
        """A choice that can be dispatched and adds nothing: distinct slots in turn, weights 0."""
        ids = torch.arange(num_tokens, device=device).unsqueeze(1) + torch.arange(self.gate.topk, device=device)
        return TopK(ids=ids % self.num_slots, weights=torch.zeros(num_tokens, self.gate.topk, device=device))
