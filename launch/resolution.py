"""Turns what was asked for into what will run: every "auto" is settled here, once, and each choice is a row of the
report.

A pure function of the flags, the model's numbers and the machine's numbers. Knows no process and imports no backend. Choices
are made in files of their own (`*_choice.py`, `*_rules.py`); here is the order in which they depend on each other. A choice
the user made and that cannot run is a ConfigError; a choice left to us that had to settle for less is a downgrade
(`launch/report.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.kernels.grouped_backends import Name as RunnerName
from moesaic.launch.attention_choice import attention_row, resolve_prefill
from moesaic.launch.compute_choice import Compute, choose_compute
from moesaic.launch.config import DispatchMode, PrefillBackend, ResolvedConfig, ServerConfig, TransferBackend
from moesaic.launch.conflicts import refuse
from moesaic.launch.deepep_rules import deepep_flag_conflicts, refuse_missing
from moesaic.launch.dispatch_choice import choose_dispatch, dispatch_mode
from moesaic.launch.dispatch_limits import StepSizes, dispatch_conflicts
from moesaic.launch.graph_rules import choose_graphs
from moesaic.launch.hardware import Hardware
from moesaic.launch.layout_rules import layout_conflicts
from moesaic.launch.model_rules import model_conflicts
from moesaic.launch.overlap_rules import overlap_conflicts
from moesaic.launch.report import Choice, refuse_downgrades
from moesaic.launch.role_plan import resolve_backend, role_flag_conflicts
from moesaic.launch.runner_choice import resolve_runners
from moesaic.launch.scheduling_choice import choose_overlap_schedule, context_length, prefix_cache_row, size_conflicts, step_sizes
from moesaic.launch.shared_gpu_rules import shared_gpu_conflicts
from moesaic.launch.symm_rules import symm_conflicts
from moesaic.launch.topology import ModelShape, Topology
from moesaic.moe.deepep_config import DeepEPSettings

PAGE_SIZE = {"cpu": 16, "cuda": 64}
MEM_FRACTION = {"cpu": 0.5, "cuda": 0.85}
MAX_QUEUED_REQUESTS = 16384


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """The outcome: what runs, where, and why."""

    config: ResolvedConfig
    topology: Topology
    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True)
class _Settled:
    """What had to be chosen, and the report's rows about it."""

    compute: Compute
    context_length: int
    runners: tuple[RunnerName, ...]
    prefill: PrefillBackend
    transfer: TransferBackend
    mode: DispatchMode
    sizes: StepSizes
    deepep: DeepEPSettings
    graph_rows: tuple[int, ...]
    overlap_schedule: bool
    rows: tuple[Choice, ...]


def resolve(config: ServerConfig, shape: ModelShape, hardware: Hardware) -> Resolution:
    """Check the layout, settle every choice, and apply `--strict`. Raises ConfigError."""
    flag_conflicts = (layout_conflicts, overlap_conflicts, role_flag_conflicts, deepep_flag_conflicts)
    refuse([conflict for conflicts in flag_conflicts for conflict in conflicts(config)])
    refuse(model_conflicts(config, shape))
    topology = Topology.from_config(config)
    settled = _settle(config, shape, topology, hardware)
    if config.strict:
        refuse_downgrades(settled.rows)
    num_threads = config.num_threads or max(1, hardware.num_cores // topology.ranks_per_node)
    return Resolution(config=_resolved(config, settled, num_threads), topology=topology, choices=settled.rows)


def _settle(config: ServerConfig, shape: ModelShape, topology: Topology, hardware: Hardware) -> _Settled:
    compute = choose_compute(config, shape, topology, hardware)
    device = compute.device
    runners, runner_row = resolve_runners(config, device, compute.expert_kind, compute.dtype, hardware)
    prefill, prefill_row = resolve_prefill(config, device, hardware)
    refuse([*symm_conflicts(config, device, compute.quantization, hardware), *shared_gpu_conflicts(config, device)])
    refuse_missing(config, device, hardware)
    transfer, role_rows = resolve_backend(config, device)
    mode = dispatch_mode(config)
    sizes = step_sizes(config, shape, device, mode, topology)
    refuse([*size_conflicts(config), *dispatch_conflicts(config, mode, sizes, topology)])
    deepep, dispatch_row = choose_dispatch(config, mode, sizes, shape, topology, fp8=compute.quantization == "fp8")
    graph_rows, graph_row = choose_graphs(config, device, mode, sizes, topology)
    overlap_schedule, overlap_row = choose_overlap_schedule(config, device)
    attention = attention_row(config, device, hardware)
    rows = (attention, prefill_row, dispatch_row, runner_row, prefix_cache_row(config), graph_row, overlap_row)
    return _Settled(
        compute=compute,
        context_length=context_length(config, shape),
        runners=runners,
        prefill=prefill,
        transfer=transfer,
        mode=mode,
        sizes=sizes,
        deepep=deepep,
        graph_rows=graph_rows,
        overlap_schedule=overlap_schedule,
        rows=(*compute.rows, *rows, *role_rows),
    )


def _resolved(config: ServerConfig, settled: _Settled, num_threads: int) -> ResolvedConfig:
    """All fields side by side: what was settled, what a flag says, and the defaults that depend on the device."""
    compute = settled.compute
    return ResolvedConfig(
        model_path=config.model_path,
        load_format="safetensors" if config.load_format == "auto" else config.load_format,
        device=compute.device,
        ranks_per_gpu=config.ranks_per_gpu,
        dtype=compute.dtype,
        kv_dtype=compute.kv_dtype,
        quantization=compute.quantization,
        context_length=settled.context_length,
        communication_backend=compute.communication,
        prefill_attention_backend=settled.prefill,
        moe_a2a_backend=config.moe_a2a_backend,
        moe_runner_backends=settled.runners,
        fp8_gemm_backends=compute.fp8_gemms,
        dispatch_mode=settled.mode,
        max_dispatch_tokens_per_rank=config.deepep_max_dispatch_tokens_per_rank,
        deepep=settled.deepep,
        enable_dp_lm_head=config.enable_dp_lm_head,
        two_batch_overlap=config.enable_two_batch_overlap,
        single_batch_overlap=config.enable_single_batch_overlap,
        tbo_token_distribution_threshold=config.tbo_token_distribution_threshold,
        overlap_schedule=settled.overlap_schedule,
        disaggregation_mode=config.disaggregation_mode,
        transfer_backend=settled.transfer,
        mem_fraction_static=config.mem_fraction_static or MEM_FRACTION[compute.device],
        max_running_requests_per_dp=settled.sizes.running_requests,
        max_total_tokens=config.max_total_tokens,
        chunked_prefill_tokens_per_dp=settled.sizes.prompt_tokens,
        recorder_mode=config.expert_distribution_recorder_mode,
        recorder_buffer_size=config.expert_distribution_recorder_buffer_size,
        page_size=config.page_size or PAGE_SIZE[compute.device],
        cuda_graph_rows=settled.graph_rows,
        schedule_policy=config.schedule_policy,
        enable_prefix_cache=not config.disable_radix_cache,
        num_threads=num_threads,
        dist_timeout=config.dist_timeout,
        watchdog_timeout=config.watchdog_timeout,
        load_balance_method="total_tokens" if config.load_balance_method == "auto" else config.load_balance_method,
        max_queued_requests=config.max_queued_requests or MAX_QUEUED_REQUESTS,
        log_level=config.log_level,
        decode_log_interval=config.decode_log_interval,
    )
