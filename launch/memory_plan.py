"""The memory of one rank, planned before any weight is read: what is fixed, what the KV pool gets, what is left.

`--mem-fraction-static` has two sides: weights, buffers and the KV pool on one, what a step needs for a moment on the other. All
ranks of a layout hold equally much, so one plan speaks for all. Knows no device: it is told how much memory a rank has. Beside a
GPU's memory there is the host's, which a decode instance keeps the KV of retracted requests in; on a CPU the two are one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from moesaic.launch.config import ResolvedConfig
from moesaic.launch.engine.memory import DeviceMemory, kv_budget_bytes, plan_num_host_pages, plan_num_pages
from moesaic.launch.memory_parts import (
    DEFAULT_HOST_KV_GB,
    MemoryInputs,
    MemoryItem,
    activation_item,
    graph_item,
    kv_bytes_per_token,
    rope_table_bytes,
    staging_bytes,
    weight_bytes,
    window_bytes,
)
from moesaic.launch.models.tensors import Kind
from moesaic.launch.report import Choice

if TYPE_CHECKING:
    from rich.table import Table

GIB = 1 << 30
CONTEXT_BYTES = 1 << 30
"""What a CUDA context with its libraries takes of a GPU. Estimate."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """One rank, in bytes. `memory`: what it has, None if not known here; then `kv_tokens` is None too unless a flag says it.

    `weights` and `buffers` are there before the KV pool is made; `momentary` is needed now and then while serving.
    `min_kv_tokens`: what the pool must hold, one sequence of the context length, or what --max-total-tokens asks for. `host`: what
    is kept in host memory, of which a rank may have `host_room_bytes` (None: not known), and `host_kv_gb` the limit of it.
    """

    memory: DeviceMemory | None
    weights: tuple[MemoryItem, ...]
    buffers: tuple[MemoryItem, ...]
    momentary: tuple[MemoryItem, ...]
    kv_bytes_per_token: int
    kv_budget_bytes: int
    min_kv_tokens: int
    kv_tokens: int | None
    host: tuple[MemoryItem, ...]
    host_room_bytes: int | None
    host_kv_gb: float = 0.0

    @property
    def fixed_bytes(self) -> int:
        return sum(item.num_bytes for item in (*self.weights, *self.buffers))

    @property
    def momentary_bytes(self) -> int:
        return sum(item.num_bytes for item in self.momentary)

    @property
    def kv_bytes(self) -> int:
        return (self.kv_tokens or 0) * self.kv_bytes_per_token

    @property
    def needed_bytes(self) -> int:
        """The least that this rank can do with."""
        return self.fixed_bytes + self.momentary_bytes + self.min_kv_tokens * self.kv_bytes_per_token

    @property
    def headroom_bytes(self) -> int:
        """What nothing is planned for; negative: the plan does not fit."""
        assert self.memory is not None, "headroom needs a device"
        return self.memory.free - self.fixed_bytes - self.kv_bytes - self.momentary_bytes

    @property
    def host_bytes(self) -> int:
        return sum(item.num_bytes for item in self.host)

    @property
    def host_fits(self) -> bool:
        """True also where it is not known how much there is, or how much will be kept."""
        return self.kv_tokens is None or self.host_room_bytes is None or self.host_bytes <= self.host_room_bytes

    @property
    def fits(self) -> bool:
        """True also where the memory is not known: the ranks will see."""
        if self.memory is None:
            return True
        return self.kv_tokens is not None and self.kv_tokens >= self.min_kv_tokens and self.headroom_bytes >= 0


def plan_memory(inputs: MemoryInputs, memory: DeviceMemory | None, host_free: int | None = None) -> MemoryPlan:
    """`memory`: of one rank, before anything is loaded. `host_free`: bytes that a rank on a GPU may have of its host's memory.

    Refuses nothing (`memory_advice.py` does).
    """
    config = inputs.config
    weights = tuple(
        MemoryItem(name=f"weights: {kind}", num_bytes=size, basis=_weight_basis(inputs, kind))
        for kind, size in weight_bytes(inputs).items()
        if size
    )
    buffers = (*_own_buffers(inputs), *inputs.communication(config, inputs.topology))
    fixed = sum(item.num_bytes for item in (*weights, *buffers))
    per_token = kv_bytes_per_token(inputs)
    budget = 0 if memory is None else kv_budget_bytes(config, DeviceMemory(total=memory.total, free=memory.free - fixed))
    plan = MemoryPlan(
        memory=memory,
        weights=weights,
        buffers=buffers,
        momentary=tuple(item for item in _momentary(inputs) if item.num_bytes),
        kv_bytes_per_token=per_token,
        kv_budget_bytes=max(0, budget),
        min_kv_tokens=_min_kv_tokens(config),
        kv_tokens=_kv_tokens(inputs, per_token, memory, budget),
        host=(),
        host_room_bytes=host_free,
    )
    room = plan.headroom_bytes if config.device == "cpu" and memory is not None else host_free
    plan = replace(plan, host_room_bytes=room, host_kv_gb=_host_kv_gb(inputs, room))
    return replace(plan, host=tuple(_host(inputs, plan)))


def _kv_tokens(inputs: MemoryInputs, per_token: int, memory: DeviceMemory | None, budget: int) -> int | None:
    config = inputs.config
    if memory is None and config.max_total_tokens is None:
        return None
    try:
        return plan_num_pages(config, per_token, budget) * config.page_size
    except ValueError:
        return max(0, budget) // per_token // config.page_size * config.page_size


def _min_kv_tokens(config: ResolvedConfig) -> int:
    if config.max_total_tokens is None:
        return config.context_length
    return max(1, config.max_total_tokens // config.page_size) * config.page_size


def _weight_basis(inputs: MemoryInputs, kind: Kind) -> str:
    stored = "FP8 with scales" if kind in inputs.fp8 else inputs.config.dtype
    if kind == "routed experts":
        return f"{inputs.slots_per_rank} of {inputs.num_slots} slots in each of {len(inputs.model.sparse_layers)} layers, {stored}"
    if kind == "attention" and kind in inputs.fp8:
        return f"{stored}, kv_b_proj {inputs.config.dtype}"
    if kind == "gates and norms":
        return f"gates float32, norms {inputs.config.dtype}"
    return inputs.config.dtype if kind == "embedding and head" else stored


def _own_buffers(inputs: MemoryInputs) -> Iterator[MemoryItem]:
    yield MemoryItem(name="rotary table", num_bytes=rope_table_bytes(inputs), basis=f"{inputs.config.context_length:,} positions")
    windows = window_bytes(inputs)
    if windows:
        tokens = inputs.config.max_dispatch_tokens_per_rank
        yield MemoryItem(
            name="symmetric windows", num_bytes=windows, basis=f"{tokens} tokens from each of {inputs.topology.ep_size} ranks"
        )
    if inputs.config.device == "cuda":
        yield MemoryItem(name="CUDA context", num_bytes=CONTEXT_BYTES, basis="estimate, with its libraries")


def _momentary(inputs: MemoryInputs) -> Iterator[MemoryItem]:
    yield graph_item(inputs)
    yield MemoryItem(name="staging of a rebalance", num_bytes=staging_bytes(inputs), basis="all slots of one layer")
    yield activation_item(inputs)


def _host_kv_gb(inputs: MemoryInputs, room: int | None) -> float:
    """What was asked for; else the default, or half of what there is: a server that nobody told to keep KV is not to fail of it."""
    if inputs.host_kv_gb is not None:
        return inputs.host_kv_gb
    return DEFAULT_HOST_KV_GB if room is None else min(DEFAULT_HOST_KV_GB, max(0, room) // 2 / 1e9)


def _host(inputs: MemoryInputs, plan: MemoryPlan) -> Iterator[MemoryItem]:
    """As many pages as a rank makes, which are no more than its pool has."""
    config = inputs.config
    num_bytes = int(plan.host_kv_gb * 1e9)
    if plan.kv_tokens is not None:
        page_bytes = config.page_size * plan.kv_bytes_per_token
        num_pages = plan.kv_tokens // config.page_size
        num_bytes = plan_num_host_pages(config, plan.host_kv_gb, plan.kv_bytes_per_token, num_pages) * page_bytes
    if num_bytes:
        tokens = num_bytes // plan.kv_bytes_per_token
        where = "of what is left over" if config.device == "cpu" else "not on the GPU"
        basis = f"{tokens:,} tokens, {where}: --disaggregation-host-kv-gb {plan.host_kv_gb:.3g}, but no more than the pool holds"
        yield MemoryItem(name="host memory: KV of retracted requests", num_bytes=num_bytes, basis=basis)


def memory_choice(plan: MemoryPlan) -> Choice:
    """The row of the resolution report."""
    weights = sum(item.num_bytes for item in plan.weights)
    chosen = f"per rank {_size(weights)} of weights"
    if plan.kv_tokens is not None:
        chosen += f", KV {plan.kv_tokens:,} tokens ({_size(plan.kv_bytes)})"
    if plan.memory is None:
        chosen += "; how much memory there is, the ranks will see"
    else:
        chosen += f", {_size(plan.headroom_bytes)} of {_size(plan.memory.total)} left over"
    if plan.host:
        chosen += f"; in host memory up to {_size(plan.host_bytes)} for retracted requests"
    return Choice(capability="memory plan", chosen=chosen)


def memory_rows(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as JSON-able values, for /server_info."""
    return {
        "total_bytes": None if plan.memory is None else plan.memory.total,
        "free_bytes": None if plan.memory is None else plan.memory.free,
        "items": [asdict(item) for item in (*plan.weights, *plan.buffers, *plan.momentary)],
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv_tokens": plan.kv_tokens,
        "kv_bytes": None if plan.kv_tokens is None else plan.kv_bytes,
        "headroom_bytes": None if plan.memory is None else plan.headroom_bytes,
        "host_items": [asdict(item) for item in plan.host],
        "host_room_bytes": plan.host_room_bytes,
    }


def render_memory(plan: MemoryPlan) -> Table:
    """The plan as a table for the terminal."""
    from rich.table import Table

    table = Table()
    table.add_column("memory of one rank")
    table.add_column("size", justify="right")
    table.add_column("basis")
    for item in (*plan.weights, *plan.buffers):
        table.add_row(item.name, _size(item.num_bytes), item.basis)
    if plan.kv_tokens is None:
        table.add_row("KV pool", "?", "what the ranks find free")
    else:
        table.add_row("KV pool", _size(plan.kv_bytes), f"{plan.kv_tokens:,} tokens of {plan.kv_bytes_per_token:,} bytes")
    for item in plan.momentary:
        table.add_row(item.name, _size(item.num_bytes), item.basis)
    if plan.memory is not None:
        total, free = _size(plan.memory.total), _size(plan.memory.free)
        table.add_row("left over", _size(plan.headroom_bytes), f"of {total}, {free} of it free now")
    for item in plan.host:
        table.add_row(item.name, _size(item.num_bytes), item.basis)
    return table


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f} GiB" if abs(num_bytes) >= GIB / 10 else f"{num_bytes / (1 << 20):,.1f} MiB"
