"""How one rank starts: joins the others, loads its weights, takes its KV memory, settles when steps are split, and has an engine.

Tells of each phase as it begins, and at last that the rank is ready. Knows no sockets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from moesaic.eplb.replica_choice import RandomChoice
from moesaic.kernels.native.build import why_missing
from moesaic.kernels.native.library import status
from moesaic.launch.engine.activity import Activity
from moesaic.launch.engine.assembly import EngineSettings, assemble_engine
from moesaic.launch.engine.calibration import Calibration, settle_profile
from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.cuda_graphs import CudaGraphs
from moesaic.launch.engine.graph_plan import GraphPlan, table_widths
from moesaic.launch.engine.memory import (
    DeviceMemory,
    kv_budget_bytes,
    measure_memory,
    plan_num_host_pages,
    plan_num_pages,
    sharers,
)
from moesaic.launch.engine.messages import OverlapProfile, Progress, Ready
from moesaic.launch.engine.model_runner import ModelRunner, RunnerConfig
from moesaic.launch.engine.process_groups import (
    EngineGroups,
    join_process_groups,
    make_engine_groups,
    make_parallel_context,
    new_group_with_deadline,
)
from moesaic.launch.engine.rank_spec import RankSpec
from moesaic.launch.engine.recording import RecordingSettings
from moesaic.launch.engine.retraction import RetractionCosts
from moesaic.launch.engine.retraction_costs import measure_costs
from moesaic.launch.engine.rooms import Rooms
from moesaic.launch.engine.scheduler import SchedulerConfig
from moesaic.launch.engine.step import StepRules
from moesaic.launch.models.config import load_model_config
from moesaic.launch.models.parallel import ParallelContext

logger = logging.getLogger(__name__)

Send = Callable[[Progress | Ready], None]
AttachRooms = Callable[[RankSpec, RankEngine], Rooms]
"""Collective, as the start-up is."""


def _tell_of_kernels(device: str) -> None:
    """The launcher only compiles: kernels that can't be loaded into a rank must not go unnoticed."""
    if device == "cpu" and status().library is None and why_missing() is None:
        logger.warning("the compiled CPU kernels can't be loaded, so torch computes: %s", status().reason)


class PhaseTimer:
    """Reports each start-up phase as it begins and keeps how long it took."""

    def __init__(self, rank: int, send: Send, activity: Activity) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._rank = rank
        self._send = send
        self._activity = activity
        self._since = time.monotonic()
        self._phase = ""

    def enter(self, phase: str, total: int = 0) -> None:
        self.leave()
        self._phase = phase
        self._activity.enter(phase)
        self.report(0, total)

    def report(self, done: int, total: int) -> None:
        self._send(Progress(rank=self._rank, phase=self._phase, done=done, total=total))

    def leave(self) -> None:
        if self._phase:
            self.seconds.append((self._phase, time.monotonic() - self._since))
        self._since = time.monotonic()


class RankStartup:
    """Start-up of one rank; `send` takes what the HTTP process is to hear of it. `attach`: of an instance with a role."""

    def __init__(self, spec: RankSpec, activity: Activity, send: Send, attach: AttachRooms | None = None) -> None:
        self._spec = spec
        self._activity = activity
        self._send = send
        self._attach = attach

    def run(self) -> RankEngine:
        """Collective."""
        spec, config = self._spec, self._spec.config
        torch.set_num_threads(config.num_threads)
        _tell_of_kernels(config.device)
        phases = PhaseTimer(spec.place.rank, self._send, self._activity)
        phases.enter("join process group")
        parallel, groups = self._join()
        runner = self._load(parallel, phases)
        phases.enter("allocate KV")
        budget = kv_budget_bytes(config, self._memory(parallel))
        num_pages = self._agree(plan_num_pages(config, runner.kv_bytes_per_token, budget), parallel)
        host_kv_gb = 0.0 if spec.role is None else spec.role.host_kv_gb
        num_host_pages = plan_num_host_pages(config, host_kv_gb, runner.kv_bytes_per_token, num_pages)
        runner.allocate_kv(num_pages, self._agree(num_host_pages, parallel))
        sizes = self._scheduler_sizes(num_pages)
        rules, profile = self._calibrated(self._step_rules(), runner, sizes, phases)
        costs = self._retraction_costs(rules, runner, sizes, phases)
        rules = self._captured(rules, runner, phases)
        engine = assemble_engine(self._settings(sizes, rules, costs), runner, self._activity, groups)
        if self._attach is not None and spec.role is not None:
            phases.enter("get ready for transfers")
            engine.attach(self._attach(spec, engine))
        phases.leave()
        self._send(
            Ready(
                rank=spec.place.rank,
                max_total_num_tokens=num_pages * config.page_size,
                kv_bytes_per_token=runner.kv_bytes_per_token,
                weight_bytes=runner.weight_bytes,
                phase_seconds=phases.seconds,
                overlap_profile=profile,
            )
        )
        return engine

    def _settings(self, sizes: SchedulerConfig, rules: StepRules, costs: RetractionCosts | None) -> EngineSettings:
        config = self._spec.config
        return EngineSettings(
            scheduler=sizes,
            rules=rules,
            recording=RecordingSettings(mode=config.recorder_mode, buffer_size=config.recorder_buffer_size),
            rebalance=self._spec.rebalance,
            overlap_schedule=config.overlap_schedule,
            retraction=costs,
        )

    def _join(self) -> tuple[ParallelContext, EngineGroups]:
        spec, config = self._spec, self._spec.config
        join_process_groups(
            spec.topology,
            spec.place,
            init_method=spec.dist_init_method,
            backend=config.communication_backend,
            timeout_s=config.dist_timeout,
        )
        new_group = new_group_with_deadline(config.dist_timeout)
        parallel = make_parallel_context(
            spec.topology,
            spec.place,
            a2a_backend=config.moe_a2a_backend,
            dp_lm_head=config.enable_dp_lm_head,
            new_group=new_group,
        )
        return parallel, make_engine_groups(spec.topology, rebalances=spec.rebalance is not None, new_group=new_group)

    def _load(self, parallel: ParallelContext, phases: PhaseTimer) -> ModelRunner:
        config = self._spec.config
        model_config = load_model_config(config.model_path)
        total = ModelRunner.count_tensors(model_config, parallel, self._spec.slots)
        phases.enter("load weights", total)
        done = 0

        def on_tensor() -> None:
            nonlocal done
            done += 1
            if done % 64 == 0 or done == total:
                phases.report(done, total)

        return ModelRunner(
            RunnerConfig(
                model_path=config.model_path,
                load_format=config.load_format,
                dtype=getattr(torch, config.dtype),
                kv_dtype=getattr(torch, config.kv_dtype),
                device=self._device(),
                context_length=config.context_length,
                page_size=config.page_size,
                prefill_backend=config.prefill_attention_backend,
                expert_backends=config.moe_runner_backends,
                fp8_gemm_backends=config.fp8_gemm_backends,
                fp8_weights=config.fp8_weights,
                max_dispatch_tokens=config.max_dispatch_tokens_per_rank,
                fp8_activations=config.quantization == "fp8",
                slots=self._spec.slots,
                single_batch_overlap=config.single_batch_overlap,
                deepep=config.deepep,
            ),
            model_config,
            parallel,
            on_tensor,
        )

    def _device(self) -> str:
        """This rank's device; on CUDA also the one that new streams and groups of this process use."""
        if self._spec.config.device == "cpu":
            return "cpu"
        index = self._spec.place.local_rank // self._spec.config.ranks_per_gpu
        torch.cuda.set_device(index)
        return f"cuda:{index}"

    def _memory(self, parallel: ParallelContext) -> DeviceMemory:
        """This rank's, now that its weights are there; where ranks share a GPU, those of all. Collective."""
        if self._spec.config.ranks_per_gpu > 1 and parallel.world_group is not None:
            dist.barrier(parallel.world_group)
        return measure_memory(self._device(), sharers(self._spec.config, self._spec.topology))

    def _agree(self, num_pages: int, parallel: ParallelContext) -> int:
        """The smallest pool of all ranks, so that the ranks of a DP group schedule alike. Nodes may differ in what they have."""
        if parallel.world_size == 1:
            return num_pages
        smallest = torch.tensor([num_pages])
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=parallel.world_group)
        return int(smallest.item())

    def _scheduler_sizes(self, num_pages: int) -> SchedulerConfig:
        config = self._spec.config
        return SchedulerConfig(
            num_pages=num_pages,
            page_size=config.page_size,
            max_running=config.max_running_requests_per_dp,
            context_length=config.context_length,
            chunk_tokens=config.chunked_prefill_tokens_per_dp,
            policy=config.schedule_policy,
            prefix_cache=config.enable_prefix_cache,
            growth_tokens=0 if self._spec.role is None else self._spec.role.num_reserved_decode_tokens,
        )

    def _step_rules(self) -> StepRules:
        config = self._spec.config
        return StepRules(
            attn_tp_size=self._spec.topology.attn_tp_size,
            a2a=config.moe_a2a_backend != "none",
            mode=config.dispatch_mode,
            cap=config.max_dispatch_tokens_per_rank,
            distribution_threshold=config.tbo_token_distribution_threshold,
        )

    def _calibrated(
        self, rules: StepRules, runner: ModelRunner, sizes: SchedulerConfig, phases: PhaseTimer
    ) -> tuple[StepRules, OverlapProfile | None]:
        """The rules with the sizes from which steps are split, and on rank 0 the timings behind them."""
        source = self._spec.thresholds
        if source is None:
            return rules, None
        phases.enter("calibrate overlap")
        split_from, profile = settle_profile(source, Calibration(runner, rules, sizes), phases.report)
        return replace(rules, split_from=split_from), profile

    def _captured(self, rules: StepRules, runner: ModelRunner, phases: PhaseTimer) -> StepRules:
        """The rules with the sizes of the decode steps that replay graphs."""
        config = self._spec.config
        if not config.cuda_graph_rows:
            return rules
        phases.enter("capture CUDA graphs")
        plan = GraphPlan(
            rows=config.cuda_graph_rows,
            widths=table_widths(config.context_length, config.page_size),
            split_from=rules.split_from.decode,
        )
        generators = [runner.replicas.generator] if isinstance(runner.replicas, RandomChoice) else []
        runner.capture_graphs(plan, CudaGraphs(generators), phases.report)
        return replace(rules, graph_rows=plan.rows)

    def _retraction_costs(
        self, rules: StepRules, runner: ModelRunner, sizes: SchedulerConfig, phases: PhaseTimer
    ) -> RetractionCosts | None:
        """None where there is no host memory for the KV of retracted sequences."""
        if runner.host_kv is None:
            return None
        phases.enter("measure retraction")
        return measure_costs(runner, runner.host_kv, rules, sizes)
