"""Runs one case on this machine: its step without communication, straight and in two micro-batches, and what its operations take.

On a GPU a decode step is a captured CUDA graph; a prefill step waits for the CPU and is run as it is. The operations are timed one
by one in a step of the first layers only, recorded once, without communication, and scaled to all layers; a decode step's launches
are queued behind a sleep there, so that the times are the device's.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import bare_import  # noqa: F401  before anything of moesaic
import torch
from slice_cases import PAGE_SIZE, Case
from slice_dispatcher import LoopbackGroup
from slice_model import SliceWeights, WeightMaker, build_slice
from slice_network import Direction
from slice_roofline import GROUPS, Group, activation_bytes, kv_bytes_per_token, weight_bytes
from slice_traffic import expert_counts
from slice_wire import Wire

from moesaic.attention.kv_pool import LatentKVPool
from moesaic.kernels.grouped_backends import Name
from moesaic.launch.engine.device_clock import device_clock
from moesaic.launch.engine.synthetic_batch import PoolShape, SyntheticBatch, decode_batch, prefill_batch
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.models.deepseek_v3 import DeepseekV3
from moesaic.launch.models.forward import ForwardInput, ForwardSplit
from moesaic.launch.models.timeline_marks import TimelineMarks
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import DispatchPlan
from moesaic.overlap.split import split_row
from moesaic.overlap.timeline import Timeline

Variant = Literal["alone", "straight", "two_batch"]
VARIANTS: tuple[Variant, ...] = ("alone", "straight", "two_batch")
"""alone: without communication time. The others wait for the tabulated times."""
MAX_POSITIONS = 8192
RECORDED_SPARSE_LAYERS = 8
RESERVE_BYTES = 3 * 10**9
"""For the CUDA context, compiled kernels and the allocator's rounding."""
QUEUE_SLEEP_CYCLES = 200_000_000
"""About 0.1 s: longer than it takes to launch RECORDED_SPARSE_LAYERS layers."""
GRAPH_REPEATS, EAGER_REPEATS = 9, 3


@dataclass(kw_only=True)
class Measured:
    """Milliseconds of a step by variant, and of its operations by group, all layers. captured: the steps were a CUDA graph."""

    step_ms: dict[Variant, float] = field(default_factory=dict)
    group_ms: dict[Group, float] = field(default_factory=dict)
    captured: bool = False
    notes: list[str] = field(default_factory=list)


def needed_bytes(config: ModelConfig, case: Case, dtype_bytes: int = 2) -> dict[str, int]:
    """What the case needs on its device: weights, KV, the activations at once (roughly) and a reserve."""
    share = case.share(config, dtype_bytes)
    return {
        "weights": sum(weight_bytes(config, share.num_local, dtype_bytes).values()),
        "kv": case.kv_tokens * kv_bytes_per_token(config, dtype_bytes),
        "activations": activation_bytes(config, share, case.ep_size),
        "reserve": RESERVE_BYTES,
    }


class RankSlice:
    """The rank of one layout (EP size and slots) on one device; weights are made at once.

    `runner` computes the experts, `fp8_gemm` the other FP8 products.
    """

    def __init__(
        self,
        config: ModelConfig,
        first: Case,
        *,
        device: torch.device,
        dtype: torch.dtype,
        wire: Wire,
        runner: Name = "torch",
        fp8_gemm: Name = "torch",
    ) -> None:
        self._config = config
        self._device = device
        self._dtype = dtype
        place = first.place(config)
        chance = torch.Generator(device).manual_seed(0)
        self.weights: SliceWeights = WeightMaker(config, dtype, device, chance, fp8_gemm=fp8_gemm).make(
            num_slots=place.num_local, max_positions=MAX_POSITIONS
        )
        self.group = LoopbackGroup(
            place=place,
            wire=wire,
            counts=lambda num_tokens, pattern: [],
            seconds=_no_time,
            device=device,
            runner=runner,
        )
        self.model = build_slice(config, self.weights, self.group)

    def measure(self, case: Case) -> Measured:
        """All variants of a case of this layout."""
        step = SliceStep(self._config, case, self.group, dtype=self._dtype)
        measured = Measured()
        try:
            for variant in VARIANTS:
                step.become(variant)
                measured.step_ms[variant] = self._step_ms(step, variant, measured)
            step.become("alone")
            measured.group_ms = self._group_ms(step)
        finally:
            del step
            self._free()
        return measured

    def _step_ms(self, step: SliceStep, variant: Variant, measured: Measured) -> float:
        split = step.split if variant == "two_batch" else None

        def run() -> None:
            self.model.forward(step.inputs, step.pool, split=split)

        if self._device.type != "cuda":
            return _host_ms(run)
        if step.case.phase == "prefill":
            return _device_ms(run, EAGER_REPEATS)
        try:
            replay = _captured(run)
        except RuntimeError as error:
            measured.notes.append(f"{variant}: not captured in a graph, so timed with its launches: {str(error)[:120]}")
            return _device_ms(run, EAGER_REPEATS)
        measured.captured = True
        elapsed = _device_ms(replay, GRAPH_REPEATS)
        del replay
        self._free()
        return elapsed

    def _group_ms(self, step: SliceStep) -> dict[Group, float]:
        config = self._config
        sparse = min(RECORDED_SPARSE_LAYERS, len(config.sparse_layers))
        num_layers = config.num_hidden_layers - len(config.sparse_layers) + sparse
        model = build_slice(config, self.weights, self.group, num_layers=num_layers)
        model.forward(step.inputs, step.pool)
        timeline = Timeline(rank=0, device_clock=device_clock(self._device))
        if self._device.type == "cuda" and step.case.phase == "decode":
            torch.cuda._sleep(QUEUE_SLEEP_CYCLES)
        _record(model, step, timeline)
        spent: dict[str, float] = defaultdict(float)
        for span in timeline.trace().row("computation"):
            spent[span.name] += span.duration_ns / 1e6
        scales: dict[Group, float] = dict.fromkeys(GROUPS, len(config.sparse_layers) / sparse)
        scales |= {"attention": config.num_hidden_layers / num_layers, "dense": 1.0, "head": 1.0}
        return {group: scales[group] * sum(spent[name] for name in names) for group, names in GROUPS.items()}

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class SliceStep:
    """One case's batch, its KV pool, and its two micro-batches; the group receives from now on what the case says."""

    def __init__(self, config: ModelConfig, case: Case, group: LoopbackGroup, *, dtype: torch.dtype) -> None:
        self.case = case
        self._config = config
        self._group = group
        num_pages = case.kv_tokens // PAGE_SIZE
        self.pool = LatentKVPool(
            num_layers=config.num_hidden_layers,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            latent_dim=config.latent_dim,
            dtype=dtype,
            device=group.device,
        )
        batch = self._batch(PoolShape(num_pages=num_pages, page_size=PAGE_SIZE, context_length=case.context))
        self.inputs = ForwardInput(
            input_ids=batch.input_ids,
            metadata=batch.metadata,
            plan=self._plan(case.num_tokens, overlaps=False),
            logit_rows=batch.logit_rows,
            num_logits_per_dp_rank=(len(batch.logit_rows),),
        )
        self.split = self._halves(batch)
        group.receive(self._counts)

    def become(self, variant: Variant) -> None:
        """Set how long communication takes in the next steps."""
        self._group.seconds = _no_time if variant == "alone" else self._tabulated

    def _counts(self, num_tokens: int, pattern: int) -> list[int]:
        counts: list[int] = expert_counts(self._group.place, num_tokens, self.case.balancedness, pattern).tolist()
        return counts

    def _tabulated(self, direction: Direction, mode: DispatchMode, num_tokens: int) -> float:
        dispatch, combine = self.case.communication_s(self._config, num_tokens)
        return dispatch if direction == "dispatch" else combine

    def _batch(self, pool: PoolShape) -> SyntheticBatch:
        case = self.case
        chance = torch.Generator().manual_seed(0)
        ids = torch.randint(self._config.vocab_size, (case.num_tokens,), generator=chance).to(self._group.device)
        if case.phase == "decode":
            return decode_batch(case.num_tokens, ids, pool, context_tokens=case.context)
        return prefill_batch(case.num_tokens, ids, pool, prompt_tokens=case.context, least_prompts=1)

    def _halves(self, batch: SyntheticBatch) -> ForwardSplit:
        cut = split_row(batch.num_decode, batch.chunk_lengths, 0.48)
        assert cut is not None, "every case has two tokens or more"
        plans = self._plan(cut, overlaps=True), self._plan(self.case.num_tokens - cut, overlaps=True)
        logits = int((batch.logit_rows < cut).sum())
        first, second = self.inputs.split(cut, plans, ((logits,), (len(batch.logit_rows) - logits,)))
        return ForwardSplit(first=first, second=second, extends=self.case.phase == "prefill")

    def _plan(self, num_tokens: int, *, overlaps: bool) -> DispatchPlan:
        return DispatchPlan(mode=self.case.mode, num_tokens_per_rank=(num_tokens,) * self.case.ep_size, overlaps=overlaps)


def _no_time(direction: Direction, mode: DispatchMode, num_tokens: int) -> float:
    return 0.0


def _record(model: DeepseekV3, step: SliceStep, timeline: Timeline) -> None:
    model.communications.marks = TimelineMarks(timeline)
    with timeline.step(0):
        model.forward(replace(step.inputs, metadata=replace(step.inputs.metadata)), step.pool, recorder=timeline)
    model.communications.marks = None


def _host_ms(run: Callable[[], None]) -> float:
    run()
    times = []
    for _ in range(EAGER_REPEATS):
        begun = time.perf_counter()
        run()
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


def _device_ms(run: Callable[[], None], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph; the first runs draw what arrives and compile kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
