"""One rank's engine from its parts: the model runner and the settings of scheduler, steps and rebalancing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.eplb.settings import RebalanceSettings
from moesaic.launch.engine.activity import Activity
from moesaic.launch.engine.controls import Controls
from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.failure_exchange import FailureExchange
from moesaic.launch.engine.forward_worker import InlineWorker, ThreadWorker
from moesaic.launch.engine.model_runner import ModelRunner
from moesaic.launch.engine.pipeline import Pipeline
from moesaic.launch.engine.process_groups import EngineGroups
from moesaic.launch.engine.profiling import Profiling
from moesaic.launch.engine.rebalancing import Rebalancing
from moesaic.launch.engine.recording import LoadRecording, RecordingSettings
from moesaic.launch.engine.results import Results
from moesaic.launch.engine.retraction import HostKeeper, RetractionCosts
from moesaic.launch.engine.scheduler import Scheduler, SchedulerConfig
from moesaic.launch.engine.step import HeaderExchange, StepRules
from moesaic.launch.engine.step_job import StepRunner
from moesaic.launch.models.parallel import ParallelContext


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """`rebalance` None: experts stay where they were loaded. overlap_schedule: schedule a step while the one before it runs.

    retraction: what decides whether KV is kept in the runner's host memory; None: it never is.
    """

    scheduler: SchedulerConfig
    rules: StepRules
    recording: RecordingSettings
    rebalance: RebalanceSettings | None = None
    overlap_schedule: bool = True
    retraction: RetractionCosts | None = None


def assemble_engine(
    settings: EngineSettings, runner: ModelRunner, activity: Activity, groups: EngineGroups | None = None
) -> RankEngine:
    """`runner` has its KV pool. `groups`: None for a rank alone."""
    parallel, groups = runner.parallel, groups or EngineGroups()
    keeper = None
    if settings.retraction is not None and runner.host_kv is not None:
        keeper = HostKeeper(runner.host_kv, settings.retraction, settings.scheduler.page_size)
    scheduler = Scheduler(settings.scheduler, keeper)
    recording = LoadRecording(settings.recording, runner.model_config, parallel, device=runner.config.device)
    rebalancing = None
    if settings.rebalance is not None:
        assert groups.rebalance is not None, "rebalancing moves weights over a group of its own"
        rebalancing = Rebalancing(settings.rebalance, runner=runner, parallel=parallel, group=groups.rebalance)
    return assemble_parts(
        scheduler=scheduler,
        runner=runner,
        recording=recording,
        rebalancing=rebalancing,
        keeper=keeper,
        rules=settings.rules,
        activity=activity,
        parallel=parallel,
        groups=groups,
        overlap_schedule=settings.overlap_schedule,
    )


def assemble_parts(
    *,
    scheduler: Scheduler,
    runner: ModelRunner,
    recording: LoadRecording,
    rebalancing: Rebalancing | None,
    rules: StepRules,
    activity: Activity,
    parallel: ParallelContext,
    groups: EngineGroups,
    overlap_schedule: bool,
    keeper: HostKeeper | None = None,
) -> RankEngine:
    """From parts that exist; benchmarks put others in their place."""
    world_size, size = parallel.world_size, parallel.attn_tp_size
    results = Results(scheduler)
    device = torch.device(runner.config.device)
    profiling = Profiling(parallel.rank, range(parallel.dp_rank * size, (parallel.dp_rank + 1) * size), device)
    step_runner = StepRunner(
        runner=runner,
        num_slots=scheduler.config.max_running,
        failures=FailureExchange(world_size, groups.failures),
        activity=activity,
    )
    worker = ThreadWorker(device) if overlap_schedule else InlineWorker()
    return RankEngine(
        scheduler=scheduler,
        runner=runner,
        rules=rules,
        exchange=HeaderExchange(world_size, groups.headers),
        recording=recording,
        activity=activity,
        pipeline=Pipeline(worker=worker, runner=step_runner, results=results, profiling=profiling, activity=activity),
        results=results,
        controls=Controls(
            scheduler=scheduler,
            recording=recording,
            rebalancing=rebalancing,
            profiling=profiling,
            refusals=FailureExchange(world_size, groups.headers),
        ),
        profiling=profiling,
        rebalancing=rebalancing,
        overlap_schedule=overlap_schedule,
        keeper=keeper,
    )
