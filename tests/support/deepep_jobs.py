"""The DeepEP dispatchers on the stand-in over gloo: seeded inputs of every rank, jobs that run one rank, the answer in float64."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import deepep_standin
import rank_pool
import torch
from torch import Tensor

from moesaic.kernels.quant import dequantize_per_token
from moesaic.moe.communication import Communications
from moesaic.moe.deepep_config import ChunkSizes, DeepEPSettings, ExchangeShape
from moesaic.moe.deepep_v1 import DeepEPBuffer, DeepEPDispatcher
from moesaic.moe.deepep_v2 import ElasticDeepEPBuffer, ElasticDeepEPDispatcher
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan, ExpertRows, MaskedRows
from moesaic.moe.experts import ExpertWeights, TorchExpertRunner
from moesaic.moe.gate import TopK
from moesaic.overlap.operations import Operation, OperationError, State, run_stage

HIDDEN, INNER, CAP = 2048, 8, 16
"""The smallest hidden size that the low-latency kernels are built for; tokens per rank of a low-latency step."""

NORMAL, LOW_LATENCY = DispatchMode.NORMAL, DispatchMode.LOW_LATENCY


@dataclass(frozen=True, kw_only=True)
class DeepEPCase:
    """One dispatch and combine. `counts`: tokens of each rank. `only_rank`: all choices fall on its experts. `gaps`: some choices
    are -1, all of some tokens.
    """

    mode: DispatchMode
    counts: tuple[int, ...]
    topk: int = 3
    only_rank: int | None = None
    gaps: bool = False
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DeepEPLayout:
    """What one buffer is made for; the cases run on it one after the other."""

    generation: str
    world: int
    num_slots: int = 8
    alignment: int = 1
    fp8: bool = False
    fp8_rows: bool = False
    mode: str = "auto"
    chunks: ChunkSizes | None = None


@dataclass(frozen=True, kw_only=True)
class DeepEPResult:
    output: Tensor
    rows_shape: tuple[int, ...]
    counts: list[int]
    masked: bool


def case_inputs(layout: DeepEPLayout, case: DeepEPCase, rank: int) -> tuple[Tensor, TopK]:
    """hidden [T, H] of the case's dtype, and distinct experts of a rank's tokens."""
    generator = torch.Generator().manual_seed(1000 * case.seed + rank)
    num_tokens = case.counts[rank]
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator).to(case.dtype)
    first, width = 0, layout.num_slots
    if case.only_rank is not None:
        width = layout.num_slots // layout.world
        first = case.only_rank * width
    ids = torch.rand(num_tokens, width, generator=generator).argsort(1)[:, : case.topk] + first
    if case.gaps:
        ids[::3, 0], ids[1::3] = -1, -1
    return hidden, TopK(ids=ids, weights=torch.rand(num_tokens, case.topk, generator=generator))


def weights_of(layout: DeepEPLayout) -> ExpertWeights:
    generator = torch.Generator().manual_seed(9)
    gate_up = torch.randn(layout.num_slots, 2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5
    down = torch.randn(layout.num_slots, HIDDEN, INNER, generator=generator) * INNER**-0.5
    return ExpertWeights(gate_up=gate_up, down=down)


def direct_sum(layout: DeepEPLayout, case: DeepEPCase, rank: int) -> Tensor:
    """Each token's weighted sum over its experts in float64, [T, H]: all experts of all tokens, and those that count are added."""
    hidden, topk = case_inputs(layout, case, rank)
    weights = weights_of(layout)
    total = torch.zeros(len(hidden), HIDDEN, dtype=torch.float64)
    for expert in range(layout.num_slots):
        gate, up = (hidden.double() @ weights.gate_up[expert].double().t()).split(INNER, dim=1)
        share = (topk.weights.double() * (topk.ids == expert)).sum(1, keepdim=True)
        total += share * ((gate * gate.sigmoid() * up) @ weights.down[expert].double().t())
    return total


def make_dispatcher(layout: DeepEPLayout, purpose: str = "forward", **options: Any) -> Any:
    """Collective. On the pool's group of the layout's ranks."""
    deepep_standin.install()
    settings = DeepEPSettings(
        mode=layout.mode,  # type: ignore[arg-type]
        max_tokens_per_rank=CAP,
        max_normal_tokens_per_rank=64,
        fp8=layout.fp8,
        dispatch=layout.chunks,
        combine=layout.chunks,
        **options,
    )
    shape = ExchangeShape(
        num_ranks=layout.world, ranks_per_node=layout.world, num_slots=layout.num_slots, hidden_size=HIDDEN, topk=8
    )
    group = rank_pool.group_of(tuple(range(layout.world)), purpose)
    if layout.generation == "deepep":
        buffer = DeepEPBuffer(settings=settings, shape=shape, group=group, device=torch.device("cpu"))
        return DeepEPDispatcher(buffer, communications=Communications(), alignment=layout.alignment, fp8_rows=layout.fp8_rows)
    elastic = ElasticDeepEPBuffer(settings=settings, shape=shape, group=group, device=torch.device("cpu"))
    return ElasticDeepEPDispatcher(elastic, communications=Communications(), alignment=layout.alignment, fp8_rows=layout.fp8_rows)


def own_experts(layout: DeepEPLayout, rank: int) -> TorchExpertRunner:
    """Computes in float32, whatever the rows' dtype."""
    weights, num_local = weights_of(layout), layout.num_slots // layout.world
    mine = slice(rank * num_local, (rank + 1) * num_local)
    return TorchExpertRunner(ExpertWeights(gate_up=weights.gate_up[mine], down=weights.down[mine]))


def dispatch_job(rank: int, layout: DeepEPLayout, cases: list[DeepEPCase]) -> list[DeepEPResult]:
    """Job for a RankPool: all cases one after the other, over one buffer."""
    dispatcher, experts = make_dispatcher(layout), own_experts(layout, rank)
    return [_run(dispatcher, experts, layout, case, rank) for case in cases]


def _run(dispatcher: Any, experts: TorchExpertRunner, layout: DeepEPLayout, case: DeepEPCase, rank: int) -> DeepEPResult:
    hidden, topk = case_inputs(layout, case, rank)
    handle = dispatcher.dispatch_a(hidden.float(), topk, DispatchPlan(mode=case.mode, num_tokens_per_rank=case.counts))
    received = dispatcher.dispatch_b(handle)
    output = dispatcher.combine_b(dispatcher.combine_a(experts.run(_plain(received.rows)), received.handle))
    return DeepEPResult(
        output=output,
        rows_shape=tuple(received.rows.hidden.shape),
        counts=torch.as_tensor(received.rows.counts).tolist(),
        masked=isinstance(received.rows, MaskedRows),
    )


def _plain(rows: ExpertRows) -> ExpertRows:
    """FP8 rows and scales multiplied out."""
    if rows.scales is None:
        return rows
    assert rows.hidden.dtype is torch.float8_e4m3fn
    width = rows.hidden.shape[-1]
    hidden = dequantize_per_token(rows.hidden.reshape(-1, width), rows.scales.reshape(-1, width // 128), torch.float32)
    return replace(rows, hidden=hidden.view(rows.hidden.shape), scales=None)


def two_in_flight_job(rank: int, layout: DeepEPLayout, cases: tuple[DeepEPCase, DeepEPCase], order: str) -> list[Tensor]:
    """Two micro-batches, call by call in `order`: dDcC are the calls of the first, eEfF those of the second."""
    dispatcher, experts = make_dispatcher(layout), own_experts(layout, rank)
    kept: list[Any] = [None, None]
    for call in order:
        number, what = ("dDcC".index(call), 0) if call in "dDcC" else ("eEfF".index(call), 1)
        if number == 0:
            hidden, topk = case_inputs(layout, cases[what], rank)
            plan = DispatchPlan(mode=cases[what].mode, num_tokens_per_rank=cases[what].counts)
            kept[what] = dispatcher.dispatch_a(hidden.float(), topk, plan)
        elif number == 1:
            kept[what] = dispatcher.dispatch_b(kept[what])
        elif number == 2:
            kept[what] = dispatcher.combine_a(experts.run(kept[what].rows), kept[what].handle)
        else:
            kept[what] = dispatcher.combine_b(kept[what])
    return kept


def late_job(rank: int, layout: DeepEPLayout, case: DeepEPCase, late_rank: int, deadline_s: float) -> str | None:
    """One rank comes late to the dispatch of layer 5 in the second micro-batch: what the others are told (None on the late rank).

    On a group of its own purpose, which is usable again afterwards.
    """
    dispatcher = make_dispatcher(layout, "rows", timeout_s=deadline_s)
    library = dispatcher._buffer.library
    if layout.generation == "deepep":
        library.cpu_timeout_s = library.gpu_timeout_s = deadline_s
    if rank == late_rank:
        time.sleep(3 * deadline_s)
    hidden, topk = case_inputs(layout, case, rank)
    plan = DispatchPlan(mode=case.mode, num_tokens_per_rank=case.counts)
    operations = [
        Operation("dispatch_a", lambda state: state.put("handle", dispatcher.dispatch_a(hidden.float(), topk, plan)), 5),
        Operation("dispatch_b", lambda state: state.put("received", dispatcher.dispatch_b(state.take("handle"))), 5),
    ]
    message = None
    try:
        run_stage(operations, State(), 1)
    except OperationError as error:
        message = str(error)
    library.fabric.drain()
    return message


def misuse_job(rank: int) -> dict[str, str]:
    """What the stand-in says of each misuse, and what results hold before they were received. Ranks do alike."""
    make_dispatcher(DeepEPLayout(generation="deepep", world=2))
    import deep_ep

    group, found = rank_pool.group_of((0, 1)), {}
    buffer = deep_ep.Buffer(group, 1 << 26, 1 << 26, low_latency_mode=True, num_qps_per_rank=4)
    case = DeepEPCase(mode=LOW_LATENCY, counts=(3, 2))
    hidden, topk = case_inputs(DeepEPLayout(generation="deepep", world=2), case, rank)

    def said(what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except (RuntimeError, AssertionError) as error:
            found[what] = str(error)

    def send(**options: Any) -> Any:
        return buffer.low_latency_dispatch(hidden, topk.ids, CAP, 8, **{"use_fp8": False, "return_recv_hook": True} | options)

    rows, count, handle, _, hook = send()
    found["before its hook"] = f"{bool(rows.isnan().all())} {int(count.max())}"
    outputs = torch.zeros(4, 2 * CAP, HIDDEN, dtype=torch.bfloat16)
    said("combine too early", lambda: buffer.low_latency_combine(outputs, topk.ids, topk.weights, handle))
    second = send()
    said("third alive", send)
    hook(), second[4]()
    said("hook twice", hook)
    found["after its hook"] = f"{int(count.sum())}"
    third = send()
    found["overwritten"] = str(bool(rows.isnan().all()))
    third[4]()
    said("wrong dtype", lambda: buffer.low_latency_dispatch(hidden.float(), topk.ids, CAP, 8))
    said("both", lambda: send(async_finish=True))
    said("too many experts", lambda: buffer.low_latency_dispatch(hidden, topk.ids, CAP, 16, use_fp8=False))
    layout = buffer.get_dispatch_layout(topk.ids, 8)
    received = buffer.dispatch(
        hidden,
        num_tokens_per_rank=layout[0],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
        topk_idx=topk.ids,
        topk_weights=topk.weights,
        async_finish=True,
    )
    found["before its event"] = str(bool(received[0].isnan().all()))
    received[-1].current_stream_wait()
    found["after its event"] = str(not received[0].isnan().any())
    said("dirty", send)
    said("stream", lambda: buffer.combine(received[0], received[4], allocate_on_comm_stream=True))
    said("small", lambda: deep_ep.Buffer(group, 100))
    return found
