"""What the ranks are told of overlap, and its rows of the resolution report: from the flags and the file of `--tbo-profile`.

The file of node 0 counts (rank 0 tells the others), so no other node needs one. Knows files and flags; measures nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from moesaic.launch.config import ResolvedConfig, ServerConfig
from moesaic.launch.conflicts import refuse
from moesaic.launch.engine.rank_spec import SPLIT_MODES, ThresholdSource
from moesaic.launch.errors import ConfigError
from moesaic.launch.hardware import machine_name
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.overlap_report import threshold_words
from moesaic.launch.overlap_rules import sparse_layer_conflicts
from moesaic.launch.report import Choice
from moesaic.launch.topology import Topology
from moesaic.overlap.calibration import BadProfile, Layout, read_profile


@dataclass(frozen=True, kw_only=True)
class OverlapPlan:
    """`thresholds` None: no two-batch overlap. `choices`: rows of the resolution report."""

    thresholds: ThresholdSource | None
    choices: tuple[Choice, ...]


def plan_overlap(config: ServerConfig, resolved: ResolvedConfig, model: ModelConfig, topology: Topology) -> OverlapPlan:
    """Raises ConfigError for a model without sparse layers, and for a profile that is bad, of another layout or not writable."""
    refuse(sparse_layer_conflicts(config, len(model.sparse_layers)))
    thresholds = _threshold_source(config, resolved, model, topology) if resolved.two_batch_overlap else None
    single = "off"
    if resolved.single_batch_overlap:
        single = "on: shared expert and down projection under dispatch and combine"
        single += "" if thresholds is None else ", in steps that are not split"
    two = "off" if thresholds is None else f"on: {_source_words(thresholds, config.node_rank)}"
    return OverlapPlan(
        thresholds=thresholds,
        choices=(Choice(capability="two-batch overlap", chosen=two), Choice(capability="single-batch overlap", chosen=single)),
    )


def profile_layout(resolved: ResolvedConfig, model: ModelConfig, topology: Topology) -> Layout:
    """What timings depend on besides the hardware; a profile that was measured with other values is refused."""
    return {
        "model": (
            f"{model.num_hidden_layers} layers of {model.hidden_size}, {model.n_routed_experts} experts of "
            f"{model.moe_intermediate_size}, {model.num_experts_per_tok} per token"
        ),
        "tp_size": topology.world_size,
        "dp_size": topology.dp_size,
        "ep_size": topology.ep_size,
        "nnodes": topology.nnodes,
        "moe_a2a_backend": resolved.moe_a2a_backend,
        "deepep_mode": resolved.dispatch_mode,
        "device": resolved.device,
        "dtype": resolved.dtype,
        "quantization": resolved.quantization,
        "single_batch_overlap": "on" if resolved.single_batch_overlap else "off",
    }


def _threshold_source(config: ServerConfig, resolved: ResolvedConfig, model: ModelConfig, topology: Topology) -> ThresholdSource:
    layout = profile_layout(resolved, model, topology)
    source = ThresholdSource(layout=layout, hardware=machine_name(resolved.device, resolved.num_threads, topology.world_size))
    if config.tbo_profile is None or config.node_rank > 0:
        return source
    path = Path(config.tbo_profile)
    if not path.exists():
        _check_writable(path)
        return replace(source, save_to=str(path.absolute()))
    try:
        return replace(source, profile=read_profile(path, layout=layout, modes=SPLIT_MODES))
    except BadProfile as error:
        raise ConfigError(f"--tbo-profile {error}") from error


def _check_writable(path: Path) -> None:
    """Known now, and not after the weights are read and everything is measured."""
    folder = path.absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ConfigError(f"--tbo-profile {path} does not exist and can't be written: {folder} is no folder one may write to")


def _source_words(source: ThresholdSource, node_rank: int) -> str:
    if node_rank > 0:
        return "from which sizes on, node 0 says"
    found = source.profile
    if found is not None:
        return f"{threshold_words(found)} (--tbo-profile, measured on {found.hardware} on {found.date})"
    kept = f" and kept in {source.save_to}" if source.save_to else ""
    return f"the sizes from which it is faster are measured when the ranks start{kept}"
