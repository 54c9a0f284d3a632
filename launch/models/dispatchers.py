"""The dispatchers of one model's sparse layers, by `--moe-a2a-backend`, and what all of them share. Knows no weights."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from moesaic.kernels.grouped_backends import BACKENDS
from moesaic.kernels.peer_exchange import PeerLayout
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.models.deepep import DeepEP
from moesaic.launch.models.deepseek_v3 import Exchange
from moesaic.launch.models.options import BuildOptions
from moesaic.launch.models.parallel import ParallelContext
from moesaic.moe.all_gather import AllGatherDispatcher
from moesaic.moe.all_to_all import AllToAllDispatcher
from moesaic.moe.communication import Communications
from moesaic.moe.config import ExpertPlacement
from moesaic.moe.counted_exchange import CountedExchange
from moesaic.moe.deepep_config import ExchangeShape
from moesaic.moe.dispatcher import Dispatcher
from moesaic.moe.symm import SymmDispatcher, triton_exchange
from moesaic.moe.symm_windows import WindowsInTurn

BACKENDS_BUILT = ("none", "torch", "symm", "deepep", "deepep_v2")


class Dispatchers:
    """Made before any weight is read: a backend may refuse, and its memory is the same whatever the weights leave. Collective.

    Raises ValueError for a backend that isn't built, and what the backend's own start raises.
    """

    def __init__(
        self, config: ModelConfig, parallel: ParallelContext, options: BuildOptions, num_slots: int, communications: Communications
    ) -> None:
        if parallel.a2a_backend not in BACKENDS_BUILT:
            raise ValueError(f"all-to-all backend {parallel.a2a_backend!r} is not built; choose one of {', '.join(BACKENDS_BUILT)}")
        self._config, self._parallel, self._options = config, parallel, options
        self._num_slots = num_slots
        self._communications = communications
        self._alignment = max(options.alignment, *(BACKENDS[name].alignment for name in options.expert_backends))
        self._deepep = self._make_deepep() if parallel.a2a_backend in ("deepep", "deepep_v2") else None

    @property
    def exchange(self) -> Exchange | None:
        """What frames a forward, where the backend's messages are not torch's collectives."""
        return self._windows if self._parallel.a2a_backend == "symm" else self._deepep

    def make(self, placement: ExpertPlacement) -> Dispatcher[Any]:
        """One layer's."""
        if self._deepep is not None:
            return self._deepep.dispatcher(self._alignment, fp8_rows=self._options.fp8_weights)
        if self._parallel.a2a_backend == "none":
            return self._all_gather(placement)
        by_collectives = self._all_to_all(placement)
        if self._parallel.a2a_backend == "torch":
            return by_collectives
        return SymmDispatcher(
            windows=self._windows, exchange=triton_exchange(), normal=by_collectives, communications=self._communications
        )

    def _all_gather(self, placement: ExpertPlacement) -> AllGatherDispatcher:
        parallel = self._parallel
        return AllGatherDispatcher(
            placement=placement,
            dp_rank=parallel.dp_rank,
            dp_size=parallel.dp_size,
            dp_group=parallel.dp_group,
            reduce_group=parallel.world_group,
            communications=self._communications,
            alignment=self._alignment,
        )

    def _all_to_all(self, placement: ExpertPlacement) -> AllToAllDispatcher:
        return AllToAllDispatcher(
            placement=placement,
            group=self._parallel.world_group,
            exchange=self._counted,
            communications=self._communications,
            alignment=self._alignment,
            halves=self._options.single_batch_overlap,
        )

    def _make_deepep(self) -> DeepEP:
        parallel, config = self._parallel, self._config
        shape = ExchangeShape(
            num_ranks=parallel.ep_size,
            ranks_per_node=parallel.ranks_per_node,
            num_slots=self._num_slots,
            hidden_size=config.hidden_size,
            topk=config.num_experts_per_tok,
        )
        return DeepEP(parallel, self._options.deepep, shape, torch.device(self._options.device), self._communications)

    @cached_property
    def _windows(self) -> WindowsInTurn:
        """For all layers: a layer's combine is over before the next one's dispatch."""
        options, parallel = self._options, self._parallel
        layout = PeerLayout(
            num_ranks=parallel.ep_size,
            num_local=self._num_slots // parallel.ep_size,
            max_tokens=options.max_dispatch_tokens,
            topk=self._config.num_experts_per_tok,
            hidden=self._config.hidden_size,
            dtype=options.dtype,
        )
        return WindowsInTurn(options.make_windows(layout, parallel.ep_rank, parallel.world_group, options.device))

    @cached_property
    def _counted(self) -> CountedExchange:
        """One for all layers: rows leave in one order."""
        return CountedExchange(
            size=self._parallel.ep_size,
            counts_group=self._parallel.world_group,
            rows_group=self._parallel.rows_group,
            communications=self._communications,
        )
