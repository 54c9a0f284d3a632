"""What to do when a memory plan does not fit: each flag that would help, and how much it frees, found by planning again with it.

Knows flags and plans, no device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moesaic.launch.config import ResolvedConfig
from moesaic.launch.errors import ConfigError
from moesaic.launch.memory_parts import MemoryInputs
from moesaic.launch.memory_plan import GIB, MemoryPlan, plan_memory
from moesaic.launch.models.tensors import FP8_KINDS

Candidate = tuple[str, MemoryInputs]


def refuse_memory(inputs: MemoryInputs, plan: MemoryPlan) -> None:
    """Raise ConfigError with the sizes, the largest items and what frees how much, if the plan does not fit."""
    if plan.fits:
        _refuse_host(inputs, plan)
        return
    assert plan.memory is not None
    lines = [
        f"the server does not fit: each rank needs {_gib(plan.needed_bytes)}, and {_gib(plan.memory.free)} are free "
        f"of its {_gib(plan.memory.total)} (--mem-fraction-static {inputs.config.mem_fraction_static:g} leaves "
        f"{_gib(plan.kv_budget_bytes)} for {plan.min_kv_tokens:,} tokens of KV, {_gib(_min_kv_bytes(plan))})",
        "  of that: " + ", ".join(f"{name} {_gib(size)}" for name, size in _largest(plan)),
        *(f"  {words}" for words in advice(inputs, plan)),
    ]
    raise ConfigError("\n".join(lines))


def _refuse_host(inputs: MemoryInputs, plan: MemoryPlan) -> None:
    if plan.host_fits:
        return
    assert plan.host_room_bytes is not None
    most = max(0, plan.host_room_bytes) // 10**8 / 10
    less = f"use --disaggregation-host-kv-gb {most:g}, or 0" if most else "use --disaggregation-host-kv-gb 0"
    shared = " beside what the server computes with" if inputs.config.device == "cpu" else ""
    raise ConfigError(
        f"--disaggregation-host-kv-gb {plan.host_kv_gb:g}: each rank would keep up to {_gib(plan.host_bytes)} of retracted "
        f"requests' KV in host memory, and a rank's share of what is free on this machine{shared} is "
        f"{_gib(plan.host_room_bytes)}; {less}: then their KV is computed again"
    )


def advice(inputs: MemoryInputs, plan: MemoryPlan) -> list[str]:
    """Remedies that free anything, the most effective first, each marked when it suffices alone."""
    remedies: list[tuple[int, str]] = []
    for flag, changed in _candidates(inputs, plan):
        other = plan_memory(changed, plan.memory)
        freed = plan.needed_bytes - other.needed_bytes
        more = other.kv_budget_bytes - plan.kv_budget_bytes
        if freed > 0 or other.fits:
            words = f"{flag} frees {_gib(freed)}" if freed > 0 else f"{flag} gives the KV pool {_gib(more)} more"
            remedies.append((freed, words + ("; that is enough" if other.fits else "")))
    return [words for _, words in sorted(remedies, key=lambda remedy: -remedy[0])]


def _candidates(inputs: MemoryInputs, plan: MemoryPlan) -> Iterator[Candidate]:
    config, topology = inputs.config, inputs.topology
    yield from _pool_candidates(inputs, plan)
    redundant = inputs.num_slots - inputs.model.n_routed_experts
    if redundant > 0:
        yield "--ep-num-redundant-experts 0", replace(inputs, num_slots=inputs.model.n_routed_experts)
    chunk = config.chunked_prefill_tokens_per_dp // 2
    if chunk >= config.page_size:
        flag = f"--chunked-prefill-size {chunk * topology.dp_size}"
        yield flag, _with(inputs, chunked_prefill_tokens_per_dp=chunk)
    running = config.max_running_requests_per_dp // 2
    if running:
        yield f"--max-running-requests {running * topology.dp_size}", _with(inputs, max_running_requests_per_dp=running)
    cap = config.max_dispatch_tokens_per_rank // 2
    if cap and config.dispatch_mode != "normal":
        yield f"--deepep-max-dispatch-tokens-per-rank {cap}", _with(inputs, max_dispatch_tokens_per_rank=cap)
    if config.enable_dp_lm_head and inputs.model.vocab_size % topology.world_size == 0:
        yield "leaving out --enable-dp-lm-head", _with(inputs, enable_dp_lm_head=False)
    if topology.moe_dense_tp_size < topology.attn_tp_size:
        flag = f"--moe-dense-tp-size {topology.attn_tp_size}"
        yield flag, replace(inputs, topology=replace(topology, moe_dense_tp_size=topology.attn_tp_size))
    yield from _format_candidates(inputs)
    yield from _wider_candidate(inputs)


def _format_candidates(inputs: MemoryInputs) -> Iterator[Candidate]:
    """Smaller numbers, where there are kernels for them."""
    if inputs.config.device == "cuda" and inputs.model.fp8_block is not None and inputs.fp8_fits and not inputs.fp8:
        yield "--quantization fp8", replace(inputs, fp8=FP8_KINDS)
    if inputs.config.kv_dtype != "float8_e4m3fn":
        yield "--kv-cache-dtype fp8_e4m3", _with(inputs, kv_dtype="float8_e4m3fn")


def _pool_candidates(inputs: MemoryInputs, plan: MemoryPlan) -> Iterator[Candidate]:
    """A smaller pool, shorter sequences, or a larger share of the memory."""
    config = inputs.config
    if config.max_total_tokens is not None:
        tokens = plan.kv_budget_bytes // plan.kv_bytes_per_token // config.page_size * config.page_size
        if 0 < tokens < config.max_total_tokens:
            yield f"--max-total-tokens {tokens}", _with(inputs, max_total_tokens=tokens)
    tokens = config.context_length // 2
    if tokens >= config.page_size:
        yield f"--context-length {tokens}", _with(inputs, context_length=tokens)
    assert plan.memory is not None
    fraction = _largest_fraction(config, plan, plan.memory.total)
    if fraction > config.mem_fraction_static:
        yield f"--mem-fraction-static {fraction:.2f}", _with(inputs, mem_fraction_static=fraction)


def _largest_fraction(config: ResolvedConfig, plan: MemoryPlan, total: int) -> float:
    """In steps of .01: the share that leaves just what a step needs for a moment."""
    assert plan.memory is not None
    whole = plan.memory.free - plan.fixed_bytes if config.device == "cpu" else total
    return int(100 * (1 - plan.momentary_bytes / whole)) / 100 if whole > plan.momentary_bytes else 0.0


def _wider_candidate(inputs: MemoryInputs) -> Iterator[Candidate]:
    """Twice the ranks, with as many slots as can be dealt to them."""
    topology = inputs.topology
    by_experts = inputs.config.moe_a2a_backend != "none"
    wider = replace(
        topology,
        world_size=2 * topology.world_size,
        dp_size=2 * topology.dp_size if topology.dp_size > 1 else 1,
        ep_size=2 * topology.ep_size if by_experts or topology.ep_size == topology.world_size else topology.ep_size,
    )
    if topology.moe_dense_tp_size == topology.attn_tp_size:
        wider = replace(wider, moe_dense_tp_size=wider.attn_tp_size)
    slots = -(-inputs.num_slots // wider.ep_size) * wider.ep_size
    if inputs.model.num_attention_heads % wider.attn_tp_size == 0:
        flags = f"--tp-size {wider.world_size}" + (f" --dp-size {wider.dp_size}" if wider.dp_size > 1 else "")
        if slots != inputs.num_slots:
            flags += f" --ep-num-redundant-experts {slots - inputs.model.n_routed_experts}"
        yield f"{flags} (twice the ranks, on as much memory each)", replace(inputs, topology=wider, num_slots=slots)


def _with(inputs: MemoryInputs, **changes: int | float | bool | str) -> MemoryInputs:
    return replace(inputs, config=replace(inputs.config, **changes))  # type: ignore[arg-type]


def _min_kv_bytes(plan: MemoryPlan) -> int:
    return plan.min_kv_tokens * plan.kv_bytes_per_token


def _largest(plan: MemoryPlan) -> list[tuple[str, int]]:
    items = [(item.name, item.num_bytes) for item in (*plan.weights, *plan.buffers, *plan.momentary)]
    return sorted([*items, ("KV", _min_kv_bytes(plan))], key=lambda item: -item[1])[:4]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
