"""How steps are scheduled: sizes per DP rank, what is done while a step computes, the prefix cache. With their report rows.

Knows flags and the model's context length. Sizes that are flags count for the whole server and are shared among its DP ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.launch.config import DeviceName, DispatchMode, ServerConfig
from moesaic.launch.conflicts import Conflict
from moesaic.launch.dispatch_limits import StepSizes, tokens_cap_per_dp
from moesaic.launch.errors import ConfigError
from moesaic.launch.report import Choice
from moesaic.launch.topology import ModelShape, Topology

MAX_RUNNING_REQUESTS_PER_DP = 256
# Half of the default low-latency cap; the other half is left to prefill.
LOW_LATENCY_RUNNING_REQUESTS_PER_DP = 64
CHUNKED_PREFILL_TOKENS_PER_DP = {"cpu": 1024, "cuda": 4096}


def context_length(config: ServerConfig, shape: ModelShape) -> int:
    """Tokens of the longest sequence. Raises ConfigError for more than the model reaches."""
    if config.context_length is not None and config.context_length > shape.context_length:
        raise ConfigError(
            f"--context-length {config.context_length}: the model reaches {shape.context_length} tokens "
            f"(max_position_embeddings); use --context-length {shape.context_length} or less"
        )
    return config.context_length or shape.context_length


def step_sizes(config: ServerConfig, shape: ModelShape, device: DeviceName, mode: DispatchMode, topology: Topology) -> StepSizes:
    """What a DP rank may bring into a step whose dispatch mode follows this rule."""
    return StepSizes(
        running_requests=_running_requests(config, mode), prompt_tokens=_prompt_tokens(config, shape, device, topology)
    )


def size_conflicts(config: ServerConfig) -> Iterator[Conflict]:
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


def choose_overlap_schedule(config: ServerConfig, device: DeviceName) -> tuple[bool, Choice]:
    """Whether the next step is scheduled while one computes."""
    if not config.disable_overlap_schedule and (device == "cuda" or config.tp_size > 1):
        return True, Choice(capability="overlap schedule", chosen="on: the next step is scheduled while one computes")
    # Measured: benchmarks/bench_zero_overhead.py. A forward leaves the CPU free while it waits for a device or for other ranks.
    reason = "--disable-overlap-schedule" if config.disable_overlap_schedule else "one CPU rank waits for nobody; slower"
    return False, Choice(capability="overlap schedule", chosen="off", refused=(("on", reason),))


def prefix_cache_row(config: ServerConfig) -> Choice:
    """The report's row of the prefix cache."""
    if config.disable_radix_cache:
        return Choice(capability="prefix cache", chosen="off", refused=(("radix", "--disable-radix-cache"),))
    return Choice(capability="prefix cache", chosen=f"radix, {config.radix_eviction_policy}, per DP rank")


def _running_requests(config: ServerConfig, mode: DispatchMode) -> int:
    if config.max_running_requests is not None:
        return max(1, config.max_running_requests // config.dp_size)
    return LOW_LATENCY_RUNNING_REQUESTS_PER_DP if mode == "low_latency" else MAX_RUNNING_REQUESTS_PER_DP


def _prompt_tokens(config: ServerConfig, shape: ModelShape, device: DeviceName, topology: Topology) -> int:
    """Prompt tokens that a DP rank takes into one step. -1 turns chunking off: a chunk may be as long as a prompt can be.

    A decode instance computes prompts only for requests that it has sent back: what fits the low-latency layout beside the other
    running ones.
    """
    if config.disaggregation_mode == "decode" and config.chunked_prefill_size is None:
        cap = tokens_cap_per_dp(config.deepep_max_dispatch_tokens_per_rank, config.moe_a2a_backend, topology)
        return max(1, cap - _running_requests(config, "low_latency") + 1)
    if config.chunked_prefill_size == -1:
        return context_length(config, shape)
    chunk = CHUNKED_PREFILL_TOKENS_PER_DP[device]
    if config.chunked_prefill_size is not None:
        chunk = max(1, config.chunked_prefill_size // config.dp_size)
    return min(chunk, config.max_prefill_tokens)
