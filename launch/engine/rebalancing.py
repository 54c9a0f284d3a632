"""Rebalancing on one rank, put together: what is counted, how it is solved, how weights travel, and what switches with them."""

from __future__ import annotations

import time

import torch.distributed as dist
from torch import Tensor

from moesaic.eplb.algorithm import place_experts
from moesaic.eplb.load_counter import LoadCounter
from moesaic.eplb.location import ExpertLocation, Int64Array
from moesaic.eplb.manager import RebalanceManager
from moesaic.eplb.mover import WeightMover
from moesaic.eplb.settings import RebalanceSettings
from moesaic.eplb.transfer import PendingSum, ProcessGroupWire, Quarantine, TreeSum
from moesaic.launch.engine.model_runner import ModelRunner
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
        self._counter = LoadCounter(
            num_layers=len(model.sparse_layers), num_experts=model.n_routed_experts, device=runner.config.device
        )
        self._replicas = runner.replicas
        wire, quarantine = ProcessGroupWire(group), Quarantine()
        mover = WeightMover(
            layers=[(experts.gate_up, experts.down) for experts in runner.experts],
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
            take_counts=self._counter.take,
            start_sum=start_sum,
            solve=self._solve,
            mover=mover,
            quarantine=quarantine,
            switch=self._switch,
        )

    def observe(self, layer_index: int, topk_ids: Tensor) -> None:
        """Count the choices of tokens that this rank alone is responsible for."""
        if self._counts_tokens:
            self._counter.record(layer_index, topk_ids)

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
