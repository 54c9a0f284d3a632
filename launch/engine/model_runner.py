"""Owns a rank's model and KV pool, and runs one lockstep forward. Imports with torch, numpy and safetensors alone.

Knows no requests: it gets a batch of rows and the step's dispatch plan, and returns logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesaic.attention.backend import make_backend
from moesaic.attention.host_pool import HostKVPool
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.page_allocator import PageArray
from moesaic.eplb.replica_choice import ReplicaChoice
from moesaic.eplb.settings import SlotOptions
from moesaic.kernels.grouped_backends import Name
from moesaic.launch.engine.graph_plan import GraphPlan, GraphStep
from moesaic.launch.engine.graphs import GraphBackend, GraphedForwards
from moesaic.launch.models.build import DeepseekV3Builder
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.models.deepseek_v3 import DeepseekV3, LoadObserver
from moesaic.launch.models.expert_slots import expert_location
from moesaic.launch.models.forward import ForwardInput, ForwardSplit
from moesaic.launch.models.options import BuildOptions
from moesaic.launch.models.parallel import ParallelContext
from moesaic.launch.models.timeline_marks import TimelineMarks
from moesaic.launch.models.weights import CheckpointWeights, DummyWeights, WeightSource
from moesaic.moe.communication import CommunicationWatcher
from moesaic.moe.deepep_config import DeepEPSettings
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.experts import ExpertWeights
from moesaic.moe.symm_windows import MakeWindows, symmetric_windows
from moesaic.overlap.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """How a rank runs its model; `load_format` is "safetensors" or "dummy". kv_dtype None: `dtype`. Others: see `BuildOptions`."""

    model_path: str
    load_format: str = "safetensors"
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    device: str = "cpu"
    context_length: int = 4096
    page_size: int = 16
    prefill_backend: str = "own"
    expert_backends: tuple[Name, ...] = ("torch",)
    fp8_gemm_backends: tuple[Name, ...] = ("torch",)
    fp8_weights: bool = False
    max_dispatch_tokens: int = 128
    make_windows: MakeWindows = symmetric_windows
    fp8_activations: bool = False
    alignment: int = 1
    slots: SlotOptions = field(default_factory=SlotOptions)
    single_batch_overlap: bool = False
    deepep: DeepEPSettings = field(default_factory=DeepEPSettings)


class ModelRunner:
    """Weights are loaded by the constructor; the pool is made by `allocate_kv` once its size is known."""

    def __init__(
        self,
        config: RunnerConfig,
        model_config: ModelConfig,
        parallel: ParallelContext,
        on_tensor: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.parallel = parallel
        source: WeightSource
        self.weight_bytes = 0

        def count(num_bytes: int) -> None:
            self.weight_bytes += num_bytes
            on_tensor()

        if config.load_format == "dummy":
            source = DummyWeights(count)
        else:
            source = CheckpointWeights(config.model_path, count)
        options = BuildOptions(
            dtype=config.dtype,
            device=config.device,
            max_positions=config.context_length,
            expert_backends=config.expert_backends,
            fp8_gemm_backends=config.fp8_gemm_backends,
            fp8_weights=config.fp8_weights,
            max_dispatch_tokens=config.max_dispatch_tokens,
            make_windows=config.make_windows,
            fp8_activations=config.fp8_activations,
            alignment=config.alignment,
            slots=config.slots,
            single_batch_overlap=config.single_batch_overlap,
            deepep=config.deepep,
        )
        backend = make_backend(config.prefill_backend, config.device)
        self._model = DeepseekV3Builder(model_config, source, parallel, backend, options).build()
        self._pool: LatentKVPool | None = None
        self.host_kv: HostKVPool | None = None
        self._timeline: Timeline | None = None
        self._graphs: GraphedForwards | None = None

    @staticmethod
    def count_tensors(config: ModelConfig, parallel: ParallelContext, slots: SlotOptions) -> int:
        """How many tensors a rank reads, for progress bars."""
        dense = min(config.first_k_dense_replace, config.num_hidden_layers)
        sparse = config.num_hidden_layers - dense
        attention = 7 if config.q_lora_rank is None else 9
        shared = 3 if config.n_shared_experts else 0
        per_sparse = attention + 2 + shared + 3 * expert_location(config, parallel, slots).slots_per_gpu
        return 3 + dense * (attention + 3) + sparse * per_sparse

    @property
    def kv_bytes_per_token(self) -> int:
        """Exactly (kv_lora_rank + rope) elements per layer."""
        model = self.model_config
        return LatentKVPool.bytes_per_token(model.num_hidden_layers, model.latent_dim, self.config.kv_dtype or self.config.dtype)

    def allocate_kv(self, num_pages: int, num_host_pages: int = 0) -> None:
        """Make the KV pool, and where wanted `host_kv`, pages in host memory for KV that has to make room."""
        self._pool = LatentKVPool(
            num_layers=self.model_config.num_hidden_layers,
            num_pages=num_pages,
            page_size=self.config.page_size,
            latent_dim=self.model_config.latent_dim,
            dtype=self.config.kv_dtype or self.config.dtype,
            device=torch.device(self.config.device),
        )
        if num_host_pages:
            self.host_kv = HostKVPool(self._pool, num_host_pages)

    def kv_pages(self) -> list[Tensor]:
        """Each layer's KV as [num_pages, elements of a page], for those who move pages."""
        assert self._pool is not None, "allocate_kv comes first"
        return [self._pool.pages(layer) for layer in range(self.model_config.num_hidden_layers)]

    def clear_pages(self, pages: Tensor) -> None:
        """Zero the KV of these pages, int64 [P]."""
        assert self._pool is not None, "allocate_kv comes first"
        self._pool.clear(pages)

    def restore_pages(self, host_pages: PageArray, pages: PageArray) -> None:
        """Copy these pages of `host_kv`, int32 [P], into these, int32 [P]."""
        assert self.host_kv is not None, "there are no pages in host memory"
        self.host_kv.load(host_pages, pages)

    @property
    def experts(self) -> list[ExpertWeights]:
        """This rank's expert slots, sparse layer after sparse layer."""
        return self._model.experts

    @property
    def replicas(self) -> ReplicaChoice | None:
        """What maps logical experts to slots; None where that is the identity for good."""
        return self._model.replicas

    @property
    def model(self) -> DeepseekV3:
        """For those who look into it; `forward` runs it."""
        return self._model

    @property
    def timeline(self) -> Timeline | None:
        """What records the operations and communications of the forwards; None: nothing does. To be set between two forwards."""
        return self._timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self._timeline = timeline
        self._model.communications.marks = None if timeline is None else TimelineMarks(timeline)

    def watch_communications(self, watcher: CommunicationWatcher | None) -> None:
        """Show every collective of the forwards to `watcher`, which may delay it; to be set between two forwards. A timeline marks
        the delayed ones.
        """
        self._model.communications.transport = watcher

    def capture_graphs(self, plan: GraphPlan, backend: GraphBackend, on_graph: Callable[[int, int], None]) -> None:
        """Capture the decode forwards of the plan; `on_graph`: with graphs captured and graphs in all. Collective."""
        assert self._pool is not None, "allocate_kv comes first"
        device = torch.device(self.config.device)
        self._enter(DispatchMode.LOW_LATENCY)
        graphs = GraphedForwards(plan, backend, model=self._model, pool=self._pool, parallel=self.parallel, device=device)
        graphs.capture(lambda done: on_graph(done, graphs.num_graphs))
        self._graphs = graphs

    def forward(
        self,
        inputs: ForwardInput,
        observer: LoadObserver | None = None,
        split: ForwardSplit | None = None,
        graph: GraphStep | None = None,
    ) -> Tensor:
        """Logits fp32 [N, V] of the wanted rows. Collective: every rank calls it in every step that isn't idle for all.

        `split`: run as these two micro-batches; `graph`: replay it instead, the logits of whose blank rows come after those of the
        N; on all ranks or on none. To be followed by `verify`. Raises OperationError: with `fatal` False only after all collectives
        of the forward have been completed, so that the next forward may be run; the KV that this one wrote is void.
        """
        assert self._pool is not None, "allocate_kv comes first"
        if graph is not None:
            assert self._graphs is not None, "no graphs were captured"
            self._enter(DispatchMode.LOW_LATENCY)
            logits = self._graphs.run(inputs, graph, observer, self._timeline)
        else:
            self._enter(inputs.plan.mode)
            logits = self._model.forward(inputs, self._pool, observer, split, self._timeline)
        if self._model.exchange is not None:
            self._model.exchange.leave()
        return logits

    def verify(self) -> None:
        """Once the device has been waited for after a forward: raises if a rank was given up on in it. Any thread."""
        if self._model.exchange is not None:
            self._model.exchange.verify()

    def _enter(self, mode: DispatchMode) -> None:
        """Before a forward, and outside of what is captured."""
        if self._model.exchange is not None:
            self._model.exchange.enter(mode)
