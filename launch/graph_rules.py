"""Whether decode steps replay CUDA graphs on this server, in which sizes, and why not: a row of the resolution report.

Knows flags and settled choices; captures nothing.
"""

from __future__ import annotations

from moesaic.launch.config import DeviceName, DispatchMode, ServerConfig
from moesaic.launch.dispatch_limits import StepSizes
from moesaic.launch.engine.graph_plan import graph_rows
from moesaic.launch.errors import ConfigError
from moesaic.launch.report import Choice
from moesaic.launch.shared_gpu_rules import shares_gpus
from moesaic.launch.topology import Topology

CAPTURABLE_BACKENDS = frozenset({"deepep", "deepep_v2", "symm"})
"""Whose low-latency mode never waits for a number on the CPU."""


def choose_graphs(
    config: ServerConfig, device: DeviceName, mode: DispatchMode, sizes: StepSizes, topology: Topology
) -> tuple[tuple[int, ...], Choice]:
    """Rows of the steps to capture, () for none, and the report's row. Raises ConfigError for sizes that can't be."""
    if config.disable_cuda_graph:
        return (), Choice(capability="CUDA graphs", chosen="off", refused=(("on", "--disable-cuda-graph"),))
    obstacle = _obstacle(config, device, mode, topology)
    if obstacle is not None:
        reason, is_loss = obstacle
        off = Choice(
            capability="CUDA graphs",
            chosen="off",
            refused=(("on", reason),),
            downgrade=is_loss,
            accept="--disable-cuda-graph",
        )
        return (), off
    most = min(sizes.running_requests, config.deepep_max_dispatch_tokens_per_rank * topology.attn_tp_size)
    try:
        rows = graph_rows(config.cuda_graph_bs, min(most, config.cuda_graph_max_bs or most))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return rows, Choice(capability="CUDA graphs", chosen=f"decode steps of {_in_words(rows)} requests per DP rank")


def _obstacle(config: ServerConfig, device: DeviceName, mode: DispatchMode, topology: Topology) -> tuple[str, bool] | None:
    """Why there are none, and whether that is a loss on this server."""
    if device == "cpu":
        return "the device is cpu", False
    if shares_gpus(config, topology):
        return f"--ranks-per-gpu {config.ranks_per_gpu}: messages pass through host memory, which a graph can't hold", True
    if mode == "normal":
        return "normal dispatch waits for counts on the CPU", config.disaggregation_mode != "prefill"
    if config.moe_a2a_backend not in CAPTURABLE_BACKENDS:
        return f"--moe-a2a-backend {config.moe_a2a_backend} waits on the CPU", True
    return None


def _in_words(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows)) if len(rows) <= 6 else f"{rows[0]} to {rows[-1]} ({len(rows)} sizes)"
