"""Turns what was asked for into what will run: every "auto" is settled here, once, and each choice is a row of the
report.

A pure function of the flags, the model's numbers and the machine's numbers. Knows no process and imports no backend. A
choice the user made and that cannot run is a ConfigError; a choice left to us that had to settle for less is a
downgrade (`launch/report.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from moesaic.kernels.native.build import SWITCH_VARIABLE
from moesaic.launch.attention_choice import resolve_prefill
from moesaic.launch.config import DeviceName, DispatchMode, DTypeName, KVDTypeName, ResolvedConfig, ServerConfig
from moesaic.launch.conflicts import Conflict, refuse
from moesaic.launch.deepep_rules import (
    DEEPEP_BACKENDS,
    deepep_conflicts,
    deepep_flag_conflicts,
    deepep_row,
    deepep_settings,
    exchange_shape,
    plan_of,
    refuse_missing,
)
from moesaic.launch.disaggregation.roles import role_mode
from moesaic.launch.dispatch_limits import dispatch_conflicts, tokens_cap_per_dp
from moesaic.launch.errors import ConfigError
from moesaic.launch.graph_rules import choose_graphs
from moesaic.launch.hardware import Hardware
from moesaic.launch.layout_rules import layout_conflicts
from moesaic.launch.model_rules import fp8_expert_conflicts, model_conflicts
from moesaic.launch.overlap_rules import overlap_conflicts
from moesaic.launch.report import Choice, refuse_downgrades
from moesaic.launch.role_plan import resolve_backend, role_flag_conflicts
from moesaic.launch.runner_choice import resolve_runners
from moesaic.launch.symm_rules import symm_conflicts
from moesaic.launch.topology import ModelShape, Topology
from moesaic.moe.deepep_config import DeepEPSettings

NOT_BUILT = "not built yet"
FP8_ON_DEMAND = "only on demand (--quantization fp8): its kernels have not run on hardware yet"
MAX_RUNNING_REQUESTS_PER_DP = 256
# Half of the default low-latency cap; the other half is left to prefill.
LOW_LATENCY_RUNNING_REQUESTS_PER_DP = 64
CHUNKED_PREFILL_TOKENS_PER_DP = {"cpu": 1024, "cuda": 4096}
PAGE_SIZE = {"cpu": 16, "cuda": 64}
MEM_FRACTION = {"cpu": 0.5, "cuda": 0.85}
MAX_QUEUED_REQUESTS = 16384


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """The outcome: what runs, where, and why."""

    config: ResolvedConfig
    topology: Topology
    choices: tuple[Choice, ...]


def resolve(config: ServerConfig, shape: ModelShape, hardware: Hardware) -> Resolution:
    """Check the layout, settle every choice, check again what depends on the settled sizes, and apply `--strict`."""
    flag_conflicts = (layout_conflicts, overlap_conflicts, role_flag_conflicts, deepep_flag_conflicts)
    refuse([conflict for conflicts in flag_conflicts for conflict in conflicts(config)])
    refuse(model_conflicts(config, shape))
    topology = Topology.from_config(config)
    device, device_choice = _resolve_device(config, topology, hardware)
    dtype, dtype_choice = _resolve_dtype(config, device)
    quantization, quantization_choice = _resolve_quantization(config, shape, device, dtype)
    if quantization == "fp8" and device == "cuda":
        refuse(fp8_expert_conflicts(config, shape))
    runners, runner_choice = resolve_runners(
        config, device, "fp8" if quantization == "fp8" and device == "cuda" else dtype, hardware
    )
    kv_dtype, kv_choice = _resolve_kv_dtype(config, device, dtype)
    prefill, prefill_choice = resolve_prefill(config, device, hardware)
    refuse(symm_conflicts(config, device, hardware))
    refuse_missing(config, device, hardware)
    mode, mode_choice = _resolve_dispatch(config)
    transfer_backend, role_choices = resolve_backend(config, device)
    resolved = ResolvedConfig(
        model_path=config.model_path,
        load_format="safetensors" if config.load_format == "auto" else config.load_format,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        quantization=quantization,
        context_length=_context_length(config, shape),
        communication_backend="gloo" if device == "cpu" else "nccl",
        attention_backend="torch",
        prefill_attention_backend=prefill,
        moe_a2a_backend=config.moe_a2a_backend,
        moe_runner_backends=runners,
        dispatch_mode=mode,
        max_dispatch_tokens_per_rank=config.deepep_max_dispatch_tokens_per_rank,
        deepep=DeepEPSettings(),
        enable_dp_lm_head=config.enable_dp_lm_head,
        two_batch_overlap=config.enable_two_batch_overlap,
        single_batch_overlap=config.enable_single_batch_overlap,
        tbo_token_distribution_threshold=config.tbo_token_distribution_threshold,
        overlap_schedule=_schedule_overlaps(config, device),
        disaggregation_mode=config.disaggregation_mode,
        transfer_backend=transfer_backend,
        mem_fraction_static=config.mem_fraction_static or MEM_FRACTION[device],
        max_running_requests_per_dp=_running_requests_per_dp(config, mode),
        max_total_tokens=config.max_total_tokens,
        chunked_prefill_tokens_per_dp=_chunk_tokens_per_dp(config, shape, device, topology),
        recorder_mode=config.expert_distribution_recorder_mode,
        recorder_buffer_size=config.expert_distribution_recorder_buffer_size,
        page_size=config.page_size or PAGE_SIZE[device],
        cuda_graph_rows=(),
        schedule_policy=config.schedule_policy,
        enable_prefix_cache=not config.disable_radix_cache,
        num_threads=config.num_threads or max(1, hardware.num_cores // topology.ranks_per_node),
        dist_timeout=config.dist_timeout,
        watchdog_timeout=config.watchdog_timeout,
        load_balance_method="total_tokens" if config.load_balance_method == "auto" else config.load_balance_method,
        max_queued_requests=config.max_queued_requests or MAX_QUEUED_REQUESTS,
        log_level=config.log_level,
        decode_log_interval=config.decode_log_interval,
    )
    refuse([*_size_conflicts(config), *dispatch_conflicts(resolved, topology)])
    if config.moe_a2a_backend in DEEPEP_BACKENDS:
        resolved, mode_choice = _with_deepep(config, resolved, shape, topology)
    cuda_graph_rows, graph_choice = choose_graphs(config, resolved, topology)
    resolved = replace(resolved, cuda_graph_rows=cuda_graph_rows)
    choices = (
        device_choice,
        dtype_choice,
        Choice(capability="communication", chosen=resolved.communication_backend),
        _attention_choice(config, device),
        mode_choice,
        runner_choice,
        _cpu_kernels_choice(hardware, device),
        quantization_choice,
        prefill_choice,
        kv_choice,
        _prefix_cache_choice(config),
        graph_choice,
        _overlap_choice(config, device),
        *role_choices,
    )
    if config.strict:
        refuse_downgrades(choices)
    return Resolution(config=resolved, topology=topology, choices=choices)


def _resolve_device(config: ServerConfig, topology: Topology, hardware: Hardware) -> tuple[DeviceName, Choice]:
    if config.device == "cpu":
        return "cpu", Choice(capability="device", chosen=f"cpu ({hardware.num_cores} cores)")
    wanted = topology.ranks_per_node
    reason = hardware.cuda_missing
    if 0 < hardware.num_cuda_devices < wanted:
        reason = f"{wanted} ranks per node, and torch sees {hardware.num_cuda_devices} CUDA devices"
    if hardware.num_cuda_devices >= wanted:
        return "cuda", Choice(capability="device", chosen=f"cuda ({hardware.num_cuda_devices} devices)")
    if config.device == "cuda":
        raise ConfigError(f"--device cuda: {reason}; use --device cpu, or install a CUDA build of torch on a machine with GPUs")
    chosen = f"cpu ({hardware.num_cores} cores)"
    return "cpu", Choice(capability="device", chosen=chosen, refused=(("cuda", reason),), downgrade=True, accept="--device cpu")


def _resolve_dtype(config: ServerConfig, device: DeviceName) -> tuple[DTypeName, Choice]:
    if config.dtype != "auto":
        return config.dtype, Choice(capability="dtype", chosen=config.dtype)
    if device == "cuda":
        return "bfloat16", Choice(capability="dtype", chosen="bfloat16")
    # Not a downgrade: float32 is the more exact of the two, and the faster one on most CPUs.
    return "float32", Choice(capability="dtype", chosen="float32", refused=(("bfloat16", "slower than float32 on most CPUs"),))


def _resolve_quantization(
    config: ServerConfig, shape: ModelShape, device: DeviceName, dtype: DTypeName
) -> tuple[Literal["none", "fp8"], Choice]:
    if config.quantization == "fp8":
        if not shape.fp8_checkpoint:
            raise ConfigError(
                "--quantization fp8: the checkpoint is not FP8 (its config.json has no quantization_config of 128x128 "
                "blocks); leave --quantization out, or take an FP8 checkpoint"
            )
        how = "simulated" if device == "cpu" else f"routed experts in FP8 from end to end, the rest simulated in {dtype}"
        return "fp8", Choice(capability="quantisation", chosen=f"W8A8: FP8 weights, activations per token and 128 channels, {how}")
    if not shape.fp8_checkpoint:
        return "none", Choice(capability="quantisation", chosen=f"none: weights in {dtype}")
    # On a GPU, computing in FP8 is what the checkpoint is for; on a CPU it would only be a slow simulation.
    return "none", Choice(
        capability="quantisation",
        chosen=f"FP8 weights dequantised to {dtype} at load",
        refused=(("W8A8", "simulated and slow on a CPU" if device == "cpu" else FP8_ON_DEMAND),),
        downgrade=device == "cuda" and config.quantization == "auto",
        accept="--quantization none",
    )


def _with_deepep(
    config: ServerConfig, resolved: ResolvedConfig, shape: ModelShape, topology: Topology
) -> tuple[ResolvedConfig, Choice]:
    """With what DeepEP is to be made with, and the report's row of it."""
    resolved = replace(resolved, deepep=deepep_settings(config, resolved, topology))
    refuse(deepep_conflicts(config, resolved, shape, topology))
    slots = shape.num_experts + config.ep_num_redundant_experts
    exchange = exchange_shape(topology, num_slots=slots, hidden_size=shape.hidden_size, topk=shape.topk)
    return resolved, Choice(capability="dispatch", chosen=deepep_row(resolved, plan_of(resolved, exchange)))


def _resolve_dispatch(config: ServerConfig) -> tuple[DispatchMode, Choice]:
    if config.moe_a2a_backend == "none":
        # The low-latency layout would fix sizes for a communication that has none to save: only on explicit demand.
        unified: DispatchMode = "normal" if config.deepep_mode == "auto" else config.deepep_mode
        mode = role_mode(config.disaggregation_mode, unified)
        return mode, Choice(capability="dispatch", chosen=f"none (all-gather, all-reduce), mode {mode}")
    mode = role_mode(config.disaggregation_mode, config.deepep_mode)
    rule = "auto: normal if any rank prefills, else low_latency" if mode == "auto" else mode
    how = "torch all-to-all"
    if config.moe_a2a_backend == "symm":
        how = "low-latency steps over symmetric memory in FP8, others by torch all-to-all"
    return mode, Choice(capability="dispatch", chosen=f"{how}, mode {rule}")


def _attention_choice(config: ServerConfig, device: DeviceName) -> Choice:
    """Only the torch implementation exists, which on a GPU is less than one may expect."""
    reason = "the device is cpu" if device == "cpu" else NOT_BUILT
    return Choice(
        capability="attention backend",
        chosen="torch",
        refused=(("device kernels", reason),),
        downgrade=device == "cuda" and config.attention_backend == "auto",
        accept="--attention-backend torch",
    )


def _cpu_kernels_choice(hardware: Hardware, device: DeviceName) -> Choice:
    """Compiled C for fp32 tensors on the CPU; whatever they don't cover is torch's."""
    capability, best = "CPU kernels", "compiled C"
    if device == "cuda":
        return Choice(capability=capability, chosen="not used", refused=((best, "the device is cuda"),))
    if hardware.cpu_kernels_missing is None:
        return Choice(capability=capability, chosen=best)
    refused = ((best, hardware.cpu_kernels_missing),)
    wanted = f"{SWITCH_VARIABLE}=torch"
    return Choice(
        capability=capability,
        chosen="torch",
        refused=refused,
        downgrade=hardware.cpu_kernels_missing != wanted,
        accept=f"the environment variable {wanted}",
    )


def _resolve_kv_dtype(config: ServerConfig, device: DeviceName, dtype: DTypeName) -> tuple[KVDTypeName, Choice]:
    if config.kv_cache_dtype == "fp8_e4m3":
        how = ", computed by torch, slowly: a CPU has no FP8" if device == "cpu" else ""
        return "float8_e4m3fn", Choice(capability="KV cache", chosen=f"FP8 (e4m3), scale 1{how}")
    if config.kv_cache_dtype != "auto" and dtype != "bfloat16":
        raise ConfigError(f"--kv-cache-dtype {config.kv_cache_dtype}: the model computes in {dtype}; use auto or fp8_e4m3")
    return dtype, Choice(capability="KV cache", chosen=dtype)


def _prefix_cache_choice(config: ServerConfig) -> Choice:
    if config.disable_radix_cache:
        return Choice(capability="prefix cache", chosen="off", refused=(("radix", "--disable-radix-cache"),))
    return Choice(capability="prefix cache", chosen=f"radix, {config.radix_eviction_policy}, per DP rank")


def _schedule_overlaps(config: ServerConfig, device: DeviceName) -> bool:
    return not config.disable_overlap_schedule and (device == "cuda" or config.tp_size > 1)


def _overlap_choice(config: ServerConfig, device: DeviceName) -> Choice:
    if _schedule_overlaps(config, device):
        return Choice(capability="overlap schedule", chosen="on: the next step is scheduled while one computes")
    # Measured: benchmarks/bench_zero_overhead.py. A forward leaves the CPU free while it waits for a device or for other ranks.
    reason = "--disable-overlap-schedule" if config.disable_overlap_schedule else "one CPU rank waits for nobody; slower"
    return Choice(capability="overlap schedule", chosen="off", refused=(("on", reason),))


def _context_length(config: ServerConfig, shape: ModelShape) -> int:
    if config.context_length is not None and config.context_length > shape.context_length:
        raise ConfigError(
            f"--context-length {config.context_length}: the model reaches {shape.context_length} tokens "
            f"(max_position_embeddings); use --context-length {shape.context_length} or less"
        )
    return config.context_length or shape.context_length


def _running_requests_per_dp(config: ServerConfig, mode: DispatchMode) -> int:
    if config.max_running_requests is not None:
        return max(1, config.max_running_requests // config.dp_size)
    return LOW_LATENCY_RUNNING_REQUESTS_PER_DP if mode == "low_latency" else MAX_RUNNING_REQUESTS_PER_DP


def _chunk_tokens_per_dp(config: ServerConfig, shape: ModelShape, device: DeviceName, topology: Topology) -> int:
    """Prompt tokens that a DP rank takes into one step. -1 turns chunking off: a chunk may be as long as a prompt can be.

    A decode instance computes prompts only for requests that it has sent back: what fits the low-latency layout beside the other
    running ones.
    """
    if config.disaggregation_mode == "decode" and config.chunked_prefill_size is None:
        cap = tokens_cap_per_dp(config.deepep_max_dispatch_tokens_per_rank, config.moe_a2a_backend, topology)
        return max(1, cap - _running_requests_per_dp(config, "low_latency") + 1)
    if config.chunked_prefill_size == -1:
        return _context_length(config, shape)
    chunk = CHUNKED_PREFILL_TOKENS_PER_DP[device]
    if config.chunked_prefill_size is not None:
        chunk = max(1, config.chunked_prefill_size // config.dp_size)
    return min(chunk, config.max_prefill_tokens)


def _size_conflicts(config: ServerConfig) -> Iterator[Conflict]:
    """Server-wide sizes that leave a DP rank with nothing."""
    sizes = {
        "--max-running-requests": config.max_running_requests,
        "--chunked-prefill-size": config.chunked_prefill_size,
    }
    for flag, value in sizes.items():
        if value is not None and 0 < value < config.dp_size:
            yield Conflict(
                flags=f"{flag} {value} --dp-size {config.dp_size}",
                reason="the value counts for the whole server and is shared among the DP ranks",
                remedy=f"{flag} {config.dp_size} or more",
            )
