"""DeepEP on this server: what its flags ask for, what it does not support, what its buffers take, and the row of the report.

Knows flags, settled choices and the model's numbers; the limits and sizes themselves are in `moe/deepep_limits.py` and
`moe/deepep_memory.py`. `--deepep-config` is SGLang's: JSON, or a file with it, of `normal_dispatch` and `normal_combine`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from moesaic.launch.config import DeviceName, DispatchMode, ResolvedConfig, ServerConfig
from moesaic.launch.conflicts import Conflict, refuse
from moesaic.launch.dispatch_limits import StepSizes
from moesaic.launch.errors import ConfigError
from moesaic.launch.hardware import Hardware
from moesaic.launch.memory_parts import MemoryItem
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.report import Choice
from moesaic.launch.topology import ModelShape, Topology
from moesaic.moe.deepep_config import ChunkSizes, DeepEPSettings, ExchangeShape, Generation
from moesaic.moe.deepep_limits import violations
from moesaic.moe.deepep_memory import BufferPlan, plan_buffers

DEEPEP_BACKENDS = ("deepep", "deepep_v2")
_KERNELS = ("normal_dispatch", "normal_combine")


def refuse_missing(config: ServerConfig, device: DeviceName, hardware: Hardware) -> None:
    """Raises ConfigError where DeepEP was asked for and can't be had."""
    backend = config.moe_a2a_backend
    if backend not in DEEPEP_BACKENDS:
        return
    if device == "cpu":
        why = "--device cpu" if config.device == "cpu" else hardware.cuda_missing
        raise ConfigError(
            f"--moe-a2a-backend {backend}: DeepEP moves tokens between GPUs, and the device is cpu ({why}); "
            "use --moe-a2a-backend torch, or a machine with Hopper GPUs"
        )
    if hardware.deepep_missing is not None:
        raise ConfigError(f"--moe-a2a-backend {backend}: {hardware.deepep_missing}")


def deepep_flag_conflicts(config: ServerConfig) -> Iterator[Conflict]:
    """Conflicts among the flags alone."""
    backend = config.moe_a2a_backend
    if backend not in DEEPEP_BACKENDS:
        if config.deepep_config is not None:
            yield Conflict(
                flags=f"--deepep-config with --moe-a2a-backend {backend}",
                reason="it tunes DeepEP's kernels and would have no effect",
                remedy="add --moe-a2a-backend deepep or deepep_v2, or leave it out",
            )
        return
    if config.enable_single_batch_overlap:
        yield Conflict(
            flags=f"--enable-single-batch-overlap with --moe-a2a-backend {backend}",
            reason="it returns a dispatch in two halves, and DeepEP returns it as a whole",
            remedy="--enable-two-batch-overlap, or leave it out",
        )
    if config.dtype == "float32":
        yield Conflict(
            flags=f"--dtype float32 with --moe-a2a-backend {backend}",
            reason="DeepEP moves bfloat16 (or FP8) and would round float32 rows",
            remedy="--dtype bfloat16, or --moe-a2a-backend torch",
        )


def settle_deepep(
    config: ServerConfig, mode: DispatchMode, sizes: StepSizes, shape: ModelShape, topology: Topology, *, fp8: bool
) -> tuple[DeepEPSettings, Choice]:
    """What the ranks make their buffers and dispatchers with, and the report's row. `fp8`: W8A8.

    Raises ConfigError for sizes that DeepEP does not support, and for a --deepep-config that says nothing legal.
    """
    dispatch, combine = (None, None) if config.deepep_config is None else read_tuning(config.deepep_config)
    settings = DeepEPSettings(
        mode=mode,
        max_tokens_per_rank=config.deepep_max_dispatch_tokens_per_rank,
        max_normal_tokens_per_rank=_normal_tokens(sizes, topology),
        fp8=fp8,
        timeout_s=config.dist_timeout,
        dispatch=dispatch,
        combine=combine,
    )
    num_slots = shape.num_experts + config.ep_num_redundant_experts
    exchange = _exchange_shape(topology, num_slots=num_slots, hidden_size=shape.hidden_size, topk=shape.topk)
    generation = cast(Generation, config.moe_a2a_backend)
    flag = f"--moe-a2a-backend {generation}"
    found = violations(generation, settings, exchange)
    refuse(Conflict(flags=flag, reason=violation.reason, remedy=violation.remedy) for violation in found)
    buffers = plan_buffers(generation, settings, exchange)
    return settings, Choice(capability="dispatch", chosen=_described(generation, settings, buffers))


def read_tuning(text: str) -> tuple[ChunkSizes, ChunkSizes]:
    """--deepep-config -> tuning of the normal dispatch and combine. Raises ConfigError naming what is wrong in it."""
    source, content = "--deepep-config", text
    if not text.lstrip().startswith("{"):
        source = f"--deepep-config {text}"
        try:
            content = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror or error}; give a JSON file, or JSON that begins with a brace") from None
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(parsed, dict) or sorted(parsed) != sorted(_KERNELS):
        raise ConfigError(f"{source}: wanted an object with {_KERNELS[0]} and {_KERNELS[1]}, and nothing else")
    dispatch, combine = (_chunk_sizes(source, kernel, parsed[kernel]) for kernel in _KERNELS)
    if dispatch.num_sms != combine.num_sms:
        raise ConfigError(
            f"{source}: num_sms {dispatch.num_sms} and {combine.num_sms}; DeepEP's kernels share their SMs, say it alike"
        )
    return dispatch, combine


def deepep_memory(model: ModelConfig, num_slots: int, resolved: ResolvedConfig, topology: Topology) -> tuple[MemoryItem, ...]:
    """What DeepEP keeps on a rank, for the memory plan."""
    if resolved.moe_a2a_backend not in DEEPEP_BACKENDS:
        return ()
    exchange = _exchange_shape(topology, num_slots=num_slots, hidden_size=model.hidden_size, topk=model.num_experts_per_tok)
    # Sizes that advice tries out are changed in `resolved` alone.
    sizes = StepSizes(running_requests=resolved.max_running_requests_per_dp, prompt_tokens=resolved.chunked_prefill_tokens_per_dp)
    settings = replace(
        resolved.deepep,
        max_tokens_per_rank=resolved.max_dispatch_tokens_per_rank,
        max_normal_tokens_per_rank=_normal_tokens(sizes, topology),
    )
    plan = plan_buffers(cast(Generation, resolved.moe_a2a_backend), settings, exchange)
    return (MemoryItem(name="DeepEP buffers", num_bytes=plan.total_bytes, basis=plan.describe()),)


def _described(generation: Generation, settings: DeepEPSettings, plan: BufferPlan) -> str:
    rule = "auto: normal if any rank prefills, else low_latency" if settings.mode == "auto" else settings.mode
    kind = "FP8 to the experts, bf16 back" if settings.fp8 else "bf16"
    most = f"up to {settings.max_tokens_per_rank} tokens per rank in low-latency steps, " if settings.low_latency else ""
    return f"{generation}, mode {rule}, {kind}, {most}{plan.describe()}"


def _exchange_shape(topology: Topology, *, num_slots: int, hidden_size: int, topk: int) -> ExchangeShape:
    return ExchangeShape(
        num_ranks=topology.ep_size,
        ranks_per_node=topology.ranks_per_node,
        num_slots=num_slots,
        hidden_size=hidden_size,
        topk=topk,
    )


def _normal_tokens(sizes: StepSizes, topology: Topology) -> int:
    """The most that one rank brings into a step."""
    return -(-sizes.num_tokens // topology.attn_tp_size)


def _chunk_sizes(source: str, kernel: str, values: Any) -> ChunkSizes:
    known = {field.name for field in fields(ChunkSizes)}
    if not isinstance(values, dict) or not all(type(value) is int for value in values.values()):
        raise ConfigError(f"{source}: {kernel} is to be an object of whole numbers")
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{source}: {kernel} has {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    try:
        return ChunkSizes(**values)
    except ValueError as error:
        raise ConfigError(f"{source}: {kernel}: {error}") from None
