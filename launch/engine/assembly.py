"""One rank's engine from its parts: the model runner and the settings of scheduler, steps and rebalancing."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from moesaic.eplb.settings import RebalanceSettings
from moesaic.launch.engine.activity import Activity
from moesaic.launch.engine.core import RankEngine
from moesaic.launch.engine.model_runner import ModelRunner
from moesaic.launch.engine.rebalancing import Rebalancing
from moesaic.launch.engine.recording import LoadRecording, RecordingSettings
from moesaic.launch.engine.scheduler import Scheduler, SchedulerConfig
from moesaic.launch.engine.step import HeaderExchange, StepRules


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """`rebalance` None: experts stay where they were loaded."""

    scheduler: SchedulerConfig
    rules: StepRules
    recording: RecordingSettings
    rebalance: RebalanceSettings | None = None


def assemble_engine(
    settings: EngineSettings, runner: ModelRunner, activity: Activity, rebalance_group: dist.ProcessGroup | None = None
) -> RankEngine:
    """`runner` has its KV pool. `rebalance_group`: all ranks, for the movement of weights alone; needed by `rebalance`."""
    parallel = runner.parallel
    rebalancing = None
    if settings.rebalance is not None:
        assert rebalance_group is not None, "rebalancing moves weights over a group of its own"
        rebalancing = Rebalancing(settings.rebalance, runner=runner, parallel=parallel, group=rebalance_group)
    return RankEngine(
        scheduler=Scheduler(settings.scheduler),
        runner=runner,
        rules=settings.rules,
        exchange=HeaderExchange(parallel.world_size, parallel.world_group),
        recording=LoadRecording(settings.recording, runner.model_config, parallel, device=runner.config.device),
        activity=activity,
        rebalancing=rebalancing,
    )
