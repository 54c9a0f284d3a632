"""Rebalancing on one rank, put together: what is counted, how it is solved, how weights travel, and what switches with them."""

from __future__ import annotations

import time

import numpy as np
import torch.distributed as dist

from moesaic.eplb.algorithm import place_experts
from moesaic.eplb.forward_mode import FORWARD_MODES, ForwardMode
from moesaic.eplb.load_counter import LoadCounter
from moesaic.eplb.location import ExpertLocation, Int64Array
from moesaic.eplb.manager import RebalanceManager
from moesaic.eplb.mover import WeightMover
from moesaic.eplb.settings import RebalanceSettings
from moesaic.eplb.transfer import PendingSum, ProcessGroupWire, Quarantine, TreeSum
from moesaic.launch.engine.model_runner import ModelRunner
from moesaic.launch.models.deepseek_v3 import LoadObserver
from moesaic.launch.models.expert_slots import expert_location
from moesaic.launch.models.parallel import ParallelContext


class Rebalancing:
    """A manager over this rank's model. `group`: of all ranks, used by nothing else, so that a lost message harms nothing else."""

    def __init__(
        self, settings: RebalanceSettings, *, runner: ModelRunner, parallel: ParallelContext, group: dist.ProcessGroup
    ) -> None:
        model, slots = runner.model_config, runner.config.slots
        location = expert_location(model, parallel, slots)
        self._settings = settings
        self._num_groups = model.n_group
        self._counts_tokens = parallel.counts_tokens
        num_layers, num_experts, device = len(model.sparse_layers), model.n_routed_experts, runner.config.device
        self._counters = {
            mode: LoadCounter(num_layers=num_layers, num_experts=num_experts, device=device) for mode in FORWARD_MODES
        }
        self._replicas = runner.replicas
        wire, quarantine = ProcessGroupWire(group), Quarantine()
        mover = WeightMover(
            layers=[experts.tensors for experts in runner.experts],
            wire=wire,
            quarantine=quarantine,
            clock=time.monotonic,
        )

        def start_sum(array: Int64Array, cycle: int) -> PendingSum:
            return TreeSum(wire, quarantine, array, cycle)

        self.manager = RebalanceManager(
            rank=parallel.rank,
            config=settings.config,
            location=location,
            take_counts=self._take_counts,
            start_sum=start_sum,
            solve=self._solve,
            mover=mover,
            quarantine=quarantine,
            switch=self._switch,
        )

    def observer(self, mode: ForwardMode) -> LoadObserver | None:
        """What the sparse layers report to in a forward of this mode; None where another rank counts the same tokens."""
        return self._counters[mode].record if self._counts_tokens else None

    def _take_counts(self) -> Int64Array:
        return np.stack([self._counters[mode].take() for mode in FORWARD_MODES])

    def _solve(self, counts: Int64Array, location: ExpertLocation) -> Int64Array:
        if not self._settings.moves:
            return location.physical_to_logical
        wanted = place_experts(
            counts,
            num_slots=location.num_slots,
            ep_size=location.ep_size,
            num_nodes=location.num_nodes,
            num_groups=self._num_groups,
            algorithm=self._settings.algorithm,
            previous=location if self._settings.algorithm == "auto" else None,
        )
        return wanted.physical_to_logical

    def _switch(self, location: ExpertLocation, layer: int) -> None:
        assert self._replicas is not None, "a model whose experts move chooses among replicas"
        self._replicas.set_layer(layer, location.physical_to_logical[layer])
