"""Captured decode forwards: recorded once at start, replayed by a call that costs the CPU next to nothing.

Replica tables and expert weights are written in place, so a rebalance needs no new capture. What happens in Python during a forward
happens at capture alone, but for the counting of the experts' loads: the choices of every layer are kept by the graph and shown to
the step's observer after each replay. How a forward is captured is the backend's business (CudaGraphs; tests bring one that runs
on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from moesaic.attention.dp_attention import share_bounds
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.launch.engine.graph_inputs import GraphInputs
from moesaic.launch.engine.graph_plan import GraphPlan, GraphStep
from moesaic.launch.models.deepseek_v3 import DeepseekV3, LoadObserver
from moesaic.launch.models.forward import ForwardInput, ForwardSplit
from moesaic.launch.models.parallel import ParallelContext
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan
from moesaic.overlap.operations import Recorder
from moesaic.overlap.split import split_row

Replay = Callable[[], Tensor]
"""Runs what was captured again; returns the same tensor each time, with new contents."""


class GraphBackend(Protocol):
    """How forwards are captured."""

    def capture(self, forward: Callable[[], Tensor]) -> Replay:
        """Run `forward`, which works on tensors at fixed addresses, as often as capturing needs; collective where it is."""
        ...


class GraphedForwards:
    """The graphs of one rank. All ranks capture the same steps in the same order, and replay a step together."""

    def __init__(
        self,
        plan: GraphPlan,
        backend: GraphBackend,
        *,
        model: DeepseekV3,
        pool: LatentKVPool,
        parallel: ParallelContext,
        device: torch.device,
    ) -> None:
        self._plan, self._backend = plan, backend
        self._model, self._pool, self._parallel = model, pool, parallel
        self._inputs = GraphInputs(most_rows=plan.rows[-1], widths=plan.widths, pool=pool, device=device)
        # One row more than the rows: shares of two micro-batches are rounded up twice.
        self._chosen = _ChosenExperts(len(model.experts), plan.rows[-1] + 1, model.experts_per_token, device)
        self._replays: dict[tuple[GraphStep, int], Replay] = {}
        self._rows_kept: dict[GraphStep, int] = {}

    @property
    def num_graphs(self) -> int:
        """How many there are to capture."""
        return sum(1 for _ in self._plan.steps()) * len(self._plan.widths)

    def capture(self, on_graph: Callable[[int], None] = lambda done: None) -> None:
        """Collective. Called with blank rows only, so no expert gets a token. `on_graph`: with the number of graphs captured."""
        for step in self._plan.steps():
            for width in reversed(self._plan.widths):
                self._inputs.blank(step.num_rows, width)
                self._replays[step, width] = self._backend.capture(self._forward(step, width, None))
                self._rows_kept[step] = self._chosen.num_rows
                on_graph(len(self._replays))

    def run(
        self, inputs: ForwardInput, step: GraphStep, observer: LoadObserver | None = None, recorder: Recorder | None = None
    ) -> Tensor:
        """Logits fp32 [step.num_rows, V], the step's own rows first; they are overwritten by the next run. Collective.

        `inputs` are on the CPU, but for their ids, which may be on the device.
        With a recorder the same forward runs operation by operation, beside ranks that may replay it.
        """
        width = self._plan.width(max((bucket.page_table.shape[1] for bucket in inputs.metadata.buckets), default=1))
        self._inputs.load(inputs, step.num_rows, width)
        logits = self._replays[step, width]() if recorder is None else self._forward(step, width, recorder)()
        if observer is not None:
            # What a rank keeps of its share has blank rows anywhere; otherwise they come last.
            scatters = self._parallel.scatters_tokens
            self._chosen.show(observer, self._rows_kept[step] if scatters else len(inputs.input_ids))
        return logits

    def _forward(self, step: GraphStep, width: int, recorder: Recorder | None) -> Callable[[], Tensor]:
        """A forward of the static rows."""
        inputs = self._inputs.view(step.num_rows, width, self._dispatch(step.num_rows), self._parallel.dp_size)
        split = self._split(inputs, step) if step.splits else None

        def forward() -> Tensor:
            self._chosen.restart()
            return self._model.forward(inputs, self._pool, self._chosen.keep, split, recorder)

        return forward

    def _split(self, inputs: ForwardInput, step: GraphStep) -> ForwardSplit:
        cut = split_row(step.num_rows, [], 0.0)
        assert cut is not None, "a graph of one row does not split"
        dp_size, rest = self._parallel.dp_size, step.num_rows - cut
        plans = self._dispatch(cut, overlaps=True), self._dispatch(rest, overlaps=True)
        num_logits = (cut,) * dp_size, (rest,) * dp_size
        first, second = inputs.split(cut, plans, num_logits)
        return ForwardSplit(first=first, second=second, extends=False)

    def _dispatch(self, num_rows: int, *, overlaps: bool = False) -> DispatchPlan:
        """Every DP rank has as many rows."""
        parallel = self._parallel
        size = parallel.attn_tp_size if parallel.a2a_backend != "none" else 1
        bounds = [share_bounds(num_rows, rank, size) for rank in range(size)]
        shares = tuple(stop - start for start, stop in bounds) * parallel.dp_size
        return DispatchPlan(mode=DispatchMode.LOW_LATENCY, num_tokens_per_rank=shares, overlaps=overlaps)


class _ChosenExperts:
    """The choices of the last forward, int64 [sparse layers, rows, K], at a fixed address."""

    def __init__(self, num_layers: int, most_rows: int, experts_per_token: int, device: torch.device) -> None:
        self._ids = torch.full((num_layers, most_rows, experts_per_token), -1, dtype=torch.int64, device=device)
        self._filled: dict[int, int] = {}

    @property
    def num_rows(self) -> int:
        """Kept of each layer."""
        return max(self._filled.values(), default=0)

    def restart(self) -> None:
        self._filled.clear()

    def keep(self, layer_index: int, topk_ids: Tensor) -> None:
        """A LoadObserver: of micro-batches, the second's rows come after the first's."""
        start = self._filled.get(layer_index, 0)
        stop = self._filled[layer_index] = start + len(topk_ids)
        self._ids[layer_index, start:stop].copy_(topk_ids)

    def show(self, observer: LoadObserver, num_rows: int) -> None:
        """A copy: observers keep what they are shown."""
        ids = self._ids[:, :num_rows].clone()
        for layer_index, chosen in enumerate(ids):
            observer(layer_index, chosen)
