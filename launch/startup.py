"""From flags to everything a server needs to know before its first process: model read, layout checked, choices made.

Knows files and flags; starts nothing.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from moesaic.launch.args import resolve_model_path
from moesaic.launch.config import ServerConfig
from moesaic.launch.conflicts import refuse
from moesaic.launch.deepep_rules import deepep_memory
from moesaic.launch.engine.memory import DeviceMemory, measure_memory, sharers
from moesaic.launch.engine.rank_spec import RoleSpec
from moesaic.launch.errors import ConfigError
from moesaic.launch.expert_placement import ExpertPlan, placement_conflicts, plan_experts
from moesaic.launch.fp8_choice import fp8_conflicts
from moesaic.launch.gpus import query_gpus
from moesaic.launch.hardware import detect_hardware
from moesaic.launch.memory_advice import refuse_memory
from moesaic.launch.memory_parts import MemoryInputs
from moesaic.launch.memory_plan import MemoryPlan, memory_choice, plan_memory
from moesaic.launch.models.config import ModelConfig, ModelConfigError, load_model_config
from moesaic.launch.models.tensors import FP8_KINDS
from moesaic.launch.overlap_plan import OverlapPlan, plan_overlap
from moesaic.launch.resolution import Resolution, resolve
from moesaic.launch.role_plan import asked_host_kv_gb, plan_role
from moesaic.launch.topology import ModelShape
from moesaic.launch.version import version

# These may differ from node to node. Everything else shapes what the ranks do together.
NODE_LOCAL_FLAGS = frozenset(
    {
        *("node_rank", "host", "port", "api_key", "log_level", "num_threads", "strict", "enable_metrics", "device"),
        *("model_path", "tokenizer_path", "served_model_name", "skip_server_warmup", "max_queued_requests"),
        *("watchdog_timeout", "tbo_profile", "log_level_http", "log_requests", "log_requests_level", "decode_log_interval"),
    }
)
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will run. `role`: of a prefill or decode instance. `eos_token_ids` and `default_sampling` also come from
    generation_config.json.
    """

    config: ServerConfig
    model: ModelConfig
    shape: ModelShape
    resolution: Resolution
    experts: ExpertPlan
    overlap: OverlapPlan
    memory: MemoryPlan
    role: RoleSpec | None
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, object]

    @property
    def served_model_name(self) -> str:
        if self.config.served_model_name is None and self.config.model_path == resolve_model_path("demo"):
            return "demo"
        return self.config.served_model_name or self.config.model_path


def make_plan(config: ServerConfig) -> Plan:
    """Read the model's configuration and settle everything. Raises ConfigError."""
    try:
        model = load_model_config(config.model_path)
    except ModelConfigError as error:
        raise ConfigError(f"--model-path {config.model_path}: {error}") from None
    shape = model_shape(model)
    resolution = resolve(config, shape, detect_hardware(config.device, config.moe_a2a_backend))
    refuse(placement_conflicts(config, shape, resolution.topology))
    experts = plan_experts(config, model, resolution.topology)
    overlap = plan_overlap(config, resolution.config, model, resolution.topology)
    fp8_fits = not any(fp8_conflicts(config, shape))
    memory = _fitting_memory(model, resolution, experts, asked_host_kv_gb(config), fp8_fits=fp8_fits)
    choices = (*resolution.choices, experts.choice(), *overlap.choices, memory_choice(memory))
    resolution = replace(resolution, choices=choices)
    generation = _generation_config(Path(config.model_path))
    return Plan(
        config=config,
        model=model,
        shape=shape,
        resolution=resolution,
        experts=experts,
        overlap=overlap,
        memory=memory,
        role=plan_role(config, resolution.config, memory.host_kv_gb),
        eos_token_ids=tuple(sorted({*model.eos_token_ids, *_token_ids(generation.get("eos_token_id"))})),
        default_sampling={key: generation[key] for key in SAMPLING_DEFAULTS if generation.get(key) is not None},
    )


def _fitting_memory(
    model: ModelConfig, resolution: Resolution, experts: ExpertPlan, host_gb: float | None, *, fp8_fits: bool
) -> MemoryPlan:
    """Raises ConfigError for what can't fit."""
    location = experts.slots.location
    num_slots = model.n_routed_experts if location is None else location.num_slots
    inputs = MemoryInputs(
        model=model,
        topology=resolution.topology,
        config=resolution.config,
        num_slots=num_slots,
        experts_move=experts.slots.movable,
        graph_batch_sizes=resolution.config.cuda_graph_rows,
        fp8=FP8_KINDS if resolution.config.fp8_weights else frozenset(),
        fp8_fits=fp8_fits,
        communication=partial(deepep_memory, model, num_slots),
        host_kv_gb=host_gb,
    )
    host = measure_memory("cpu", resolution.topology.ranks_per_node)
    plan = plan_memory(inputs, _memory_of_a_rank(resolution, host), host.free)
    refuse_memory(inputs, plan)
    return plan


def _memory_of_a_rank(resolution: Resolution, host: DeviceMemory) -> DeviceMemory | None:
    """A rank's share of the GPU with the least, or of this node's memory (`host`); None where nvidia-smi can't say."""
    if resolution.config.device == "cpu":
        return host
    num_sharers = sharers(resolution.config, resolution.topology)
    try:
        gpus = query_gpus()
    except OSError:
        return None
    least = min(gpus, key=lambda gpu: gpu.free, default=None)
    return None if least is None else DeviceMemory(total=least.total // num_sharers, free=least.free // num_sharers)


def model_shape(model: ModelConfig) -> ModelShape:
    """The numbers a layout depends on."""
    return ModelShape(
        num_heads=model.num_attention_heads,
        num_experts=model.n_routed_experts,
        hidden_size=model.hidden_size,
        moe_intermediate_size=model.moe_intermediate_size,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        context_length=model.max_position_embeddings,
        num_shared_experts=model.n_shared_experts,
        v_head_dim=model.v_head_dim,
        qk_head_dim=model.qk_nope_head_dim + model.qk_rope_head_dim,
        q_lora_rank=model.q_lora_rank,
        topk=model.num_experts_per_tok,
        fp8_checkpoint=model.fp8_block is not None,
    )


def shared_settings(plan: Plan) -> dict[str, str]:
    """What must be the same on every node, by the name a person knows it by."""
    import torch

    flags = {
        "--" + name.replace("_", "-"): "not given" if value is None else str(value)
        for name, value in asdict(plan.config).items()
        if name not in NODE_LOCAL_FLAGS
    }
    raw = (Path(plan.config.model_path) / "config.json").read_bytes()
    return {
        **flags,
        "the device (--device)": plan.resolution.config.device,
        "what computes the experts (--moe-runner-backend)": ", ".join(plan.resolution.config.moe_runner_backends),
        "what computes the other FP8 products (--fp8-gemm-backend)": ", ".join(plan.resolution.config.fp8_gemm_backends),
        "the placement of --init-expert-location (sha256)": plan.experts.digest,
        "config.json of --model-path (sha256)": hashlib.sha256(raw).hexdigest()[:16],
        "moesaic version": version(),
        "torch version": torch.__version__,
        "Python version": ".".join(platform.python_version_tuple()[:2]),
    }


def _generation_config(folder: Path) -> dict[str, object]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not an object")
    # do_sample false is how transformers says "greedy", whatever the temperature beside it.
    return content if content.get("do_sample", True) else content | {"temperature": 0.0}


def _token_ids(value: object) -> list[int]:
    if isinstance(value, list):
        return [int(token) for token in value]
    return [value] if isinstance(value, int) else []
