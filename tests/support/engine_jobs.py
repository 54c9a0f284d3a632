"""Runs the real engine on one or several ranks for tests: real model, scheduler, sampler and collectives, without sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import deepep_standin
import rank_pool
import torch
from repeated_calls import RepeatedCalls
from shared_windows import shared_windows

from moesaic.eplb.settings import RebalanceSettings, SlotOptions
from moesaic.eplb.status import RebalanceStatus
from moesaic.eplb.window_balance import Balance
from moesaic.kernels.grouped_backends import Name
from moesaic.launch.engine.activity import Activity
from moesaic.launch.engine.assembly import EngineSettings as AssembledSettings
from moesaic.launch.engine.assembly import assemble_engine
from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.cuda_graphs import CudaGraphs
from moesaic.launch.engine.graph_plan import GraphPlan
from moesaic.launch.engine.graphs import GraphBackend
from moesaic.launch.engine.messages import AbortRequest, Control, GenerateRequest, RequestOutput, SamplingParams, every_output
from moesaic.launch.engine.model_runner import ModelRunner, RunnerConfig
from moesaic.launch.engine.process_groups import NewGroup, make_engine_groups, make_parallel_context
from moesaic.launch.engine.recording import RecordingSettings
from moesaic.launch.engine.retraction import RetractionCosts
from moesaic.launch.engine.scheduler import SchedulerConfig
from moesaic.launch.engine.step import SplitThresholds, StepRules
from moesaic.launch.models.config import load_model_config
from moesaic.launch.topology import Topology
from moesaic.moe.deepep_config import DeepEPSettings
from moesaic.moe.symm_windows import symmetric_windows

ALWAYS_KEEP = RetractionCosts(copy_s_per_page=0.0, recompute_s_per_token=1.0)
"""As long as there is room."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """A layout and the engine's knobs; defaults are one rank with plenty of memory. With host pages, what is retracted is kept.

    `staged`: the ranks talk as those that share a GPU. On a GPU the experts' products are `runner`'s and graphs are CUDA's.
    """

    model_path: str
    tp: int = 1
    dp: int = 1
    ep: int = 1
    a2a: str = "none"
    mode: str = "auto"
    dense_tp: bool = True
    dp_lm_head: bool = False
    page_size: int = 4
    num_pages: int = 256
    num_host_pages: int = 0
    max_running: int = 32
    chunk_tokens: int = 128
    cap: int = 128
    context_length: int = 256
    policy: str = "fcfs"
    prefix_cache: bool = True
    fp8_activations: bool = False
    fp8_weights: bool = False
    alignment: int = 1
    load_format: str = "safetensors"
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    prefill_backend: str = "own"
    slots: SlotOptions = field(default_factory=SlotOptions)
    recording: RecordingSettings = field(default_factory=RecordingSettings)
    rebalance: RebalanceSettings | None = None
    split_from: SplitThresholds = field(default_factory=SplitThresholds)
    overlap_schedule: bool = True
    single_batch_overlap: bool = False
    graph_rows: tuple[int, ...] = ()
    graphs: Callable[[], GraphBackend] | None = None
    device: str = "cpu"
    expert_backends: tuple[Name, ...] = ("torch",)
    staged: bool = False

    @property
    def topology(self) -> Topology:
        return Topology(
            world_size=self.tp,
            nnodes=1,
            dp_size=self.dp,
            ep_size=self.tp if self.a2a != "none" else self.ep,
            moe_dense_tp_size=self.tp // self.dp if self.dense_tp else 1,
        )


@dataclass
class Finished:
    """All that came back for one request. `last_step`: its end came from this call of `step`, where traffic_jobs counts them."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    message: str | None = None
    cached_tokens: int = 0
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    last_step: int = -1


def greedy_request(rid: int, prompt: list[int], num_tokens: int, **options: Any) -> GenerateRequest:
    """A request without end-of-sequence ids, temperature 0 unless `sampling` says otherwise."""
    sampling = SamplingParams(**{"temperature": 0.0, "max_new_tokens": num_tokens, **options.pop("sampling", {})})
    return GenerateRequest(rid=rid, input_ids=tuple(prompt), sampling=sampling, **options)


def make_runner(settings: EngineSettings, rank: int = 0, new_group: NewGroup | None = None) -> ModelRunner:
    """One rank's model with its KV pool."""
    topology, on_cpu = settings.topology, settings.device == "cpu"
    new_group = new_group or _groups(settings)
    parallel = make_parallel_context(
        topology, topology.place(rank), a2a_backend=settings.a2a, dp_lm_head=settings.dp_lm_head, new_group=new_group
    )
    runner = ModelRunner(
        RunnerConfig(
            model_path=settings.model_path,
            load_format=settings.load_format,
            dtype=settings.dtype,
            prefill_backend=settings.prefill_backend,
            device=settings.device,
            expert_backends=settings.expert_backends,
            fp8_gemm_backends=settings.expert_backends,
            kv_dtype=settings.kv_dtype,
            context_length=settings.context_length,
            page_size=settings.page_size,
            fp8_activations=settings.fp8_activations,
            fp8_weights=settings.fp8_weights,
            max_dispatch_tokens=settings.cap,
            make_windows=shared_windows if on_cpu else symmetric_windows,
            alignment=settings.alignment,
            slots=settings.slots,
            single_batch_overlap=settings.single_batch_overlap,
            deepep=_deepep(settings),
        ),
        load_model_config(settings.model_path),
        parallel,
    )
    runner.allocate_kv(settings.num_pages, settings.num_host_pages)
    if settings.graph_rows:
        widths = tuple(sorted({8, -(-settings.context_length // settings.page_size)}))
        plan = GraphPlan(rows=settings.graph_rows, widths=widths, split_from=settings.split_from.decode)
        graphs = settings.graphs or (RepeatedCalls if on_cpu else CudaGraphs)
        runner.capture_graphs(plan, graphs(), lambda done, total: None)
    return runner


def _groups(settings: EngineSettings) -> NewGroup:
    return rank_pool.staged_group_of if settings.staged else rank_pool.group_of


def _deepep(settings: EngineSettings) -> DeepEPSettings:
    if settings.a2a.startswith("deepep"):
        deepep_standin.install()
    return DeepEPSettings(
        mode=settings.mode,  # type: ignore[arg-type]
        max_tokens_per_rank=settings.cap,
        max_normal_tokens_per_rank=settings.chunk_tokens + settings.max_running,
        fp8=settings.fp8_activations,
    )


def make_engine(settings: EngineSettings, rank: int = 0, new_group: NewGroup | None = None) -> RankEngine:
    """One rank's engine. Collective when the layout has several ranks."""
    new_group = new_group or _groups(settings)
    topology, runner = settings.topology, make_runner(settings, rank, new_group)
    engine = AssembledSettings(
        scheduler=SchedulerConfig(
            num_pages=settings.num_pages,
            page_size=settings.page_size,
            max_running=settings.max_running,
            context_length=settings.context_length,
            chunk_tokens=settings.chunk_tokens,
            policy=settings.policy,
            prefix_cache=settings.prefix_cache,
        ),
        rules=StepRules(
            attn_tp_size=topology.attn_tp_size,
            a2a=settings.a2a != "none",
            mode=settings.mode,  # type: ignore[arg-type]
            cap=settings.cap,
            split_from=settings.split_from,
            graph_rows=settings.graph_rows,
        ),
        recording=settings.recording,
        rebalance=settings.rebalance,
        overlap_schedule=settings.overlap_schedule,
        retraction=ALWAYS_KEEP if settings.num_host_pages else None,
    )
    groups = make_engine_groups(topology, rebalances=settings.rebalance is not None, new_group=new_group)
    return assemble_engine(engine, runner, Activity(rank), groups)


def run_waves(engine: RankEngine, waves: list[list[GenerateRequest]]) -> dict[int, Finished]:
    """Each wave's requests are added together and run to their end before the next (so that later ones hit the cache)."""
    finished: dict[int, Finished] = {}
    for wave in waves:
        for request in wave:
            engine.apply(request)
        while True:
            result = engine.step()
            collect(finished, every_output(result.outputs, result.rids, result.tokens))
            if result.step.quiet:
                break
    return finished


def collect(finished: dict[int, Finished], outputs: Iterable[RequestOutput]) -> None:
    for output in outputs:
        entry = finished.setdefault(output.rid, Finished())
        entry.tokens += output.token_ids
        entry.finish_reason = output.finish_reason or entry.finish_reason
        entry.message = output.message or entry.message
        entry.cached_tokens = max(entry.cached_tokens, output.cached_tokens)
        entry.logprobs += output.logprobs
        entry.prompt_logprobs += output.prompt_logprobs


def engine_job(rank: int, settings: EngineSettings, waves: list[list[GenerateRequest]]) -> dict[int, Finished]:
    """Job for a RankPool: request i of a wave goes to DP rank i % dp. Returns the leader's outputs (empty on others)."""
    torch.set_num_threads(1)
    engine = make_engine(settings, rank)
    place = settings.topology.place(rank)
    own = [[request for i, request in enumerate(wave) if i % settings.dp == place.dp_rank] for wave in waves]
    finished = run_waves(engine, own)
    leaked = settings.num_pages - engine.scheduler.cache.available_pages()
    assert leaked == 0, f"{leaked} pages leaked"
    return finished if place.is_leader else {}


def rebalance_job(
    rank: int, settings: EngineSettings, waves: list[list[GenerateRequest]]
) -> tuple[dict[int, Finished], RebalanceStatus, int]:
    """As `engine_job`, with the state of the rank's manager at the end and the number of forwards right after a layer moved."""
    torch.set_num_threads(1)
    engine = make_engine(settings, rank)
    status = engine.activity.rebalance_status
    assert status is not None, "the settings rebalance"
    place = settings.topology.place(rank)
    finished: dict[int, Finished] = {}
    moved_midway = 0
    for wave in waves:
        for i, request in enumerate(wave):
            if i % settings.dp == place.dp_rank:
                engine.apply(request)
        while True:
            before = status().layers_moved
            result = engine.step()
            moved_midway += status().layers_moved > before and not result.step.idle
            collect(finished, every_output(result.outputs, result.rids, result.tokens))
            if result.step.quiet:
                break
    return finished if place.is_leader else {}, status(), moved_midway


def forward_modes_job(
    rank: int, settings: EngineSettings, requests: list[GenerateRequest]
) -> tuple[dict[str, Balance], dict[str, Balance]]:
    """What the manager reports right after the step that computes all prompts, and of the decode steps after it."""
    torch.set_num_threads(1)
    engine = make_engine(settings, rank)
    status = engine.activity.rebalance_status
    assert status is not None, "the settings rebalance"
    for i, request in enumerate(requests):
        if i % settings.dp == settings.topology.place(rank).dp_rank:
            engine.apply(request)
    reports = []
    for number in (1, 2):
        engine.control(Control(control_id=number, command="rebalance"))
        while status().skipped_cycles < number:
            engine.step()
        reports.append(status().last_balances)
    for request in requests:
        engine.apply(AbortRequest(rid=request.rid))
    while not engine.step().step.quiet:  # the next job uses the same groups: nothing may be under way
        pass
    return reports[0], reports[1]


def merged(results: list[dict[int, Finished]]) -> dict[int, Finished]:
    """One dictionary of all DP ranks' outputs."""
    return {rid: value for result in results for rid, value in result.items()}
