"""How tokens reach their experts: the rule of a step's dispatch mode, what the backend is made with, and the report's row.

Knows flags and settled sizes. What a mode means is said in `launch/disaggregation/roles.py`, DeepEP's limits in `deepep_rules.py`.
"""

from __future__ import annotations

from moesaic.launch.config import DispatchMode, ServerConfig
from moesaic.launch.deepep_rules import DEEPEP_BACKENDS, settle_deepep
from moesaic.launch.disaggregation.roles import role_mode
from moesaic.launch.dispatch_limits import StepSizes
from moesaic.launch.report import Choice
from moesaic.launch.topology import ModelShape, Topology
from moesaic.moe.deepep_config import DeepEPSettings

CAPABILITY = "dispatch"


def dispatch_mode(config: ServerConfig) -> DispatchMode:
    """The rule that every step follows; "auto" = normal if any rank prefills, else low-latency."""
    unified = config.deepep_mode
    if config.moe_a2a_backend == "none" and unified == "auto":
        # The low-latency layout would fix sizes for a communication that has none to save: only on explicit demand.
        unified = "normal"
    return role_mode(config.disaggregation_mode, unified)


def choose_dispatch(
    config: ServerConfig, mode: DispatchMode, sizes: StepSizes, shape: ModelShape, topology: Topology, *, fp8: bool
) -> tuple[DeepEPSettings, Choice]:
    """What DeepEP is made with (its defaults where it is not the backend), and the report's row. `fp8`: W8A8."""
    backend = config.moe_a2a_backend
    if backend in DEEPEP_BACKENDS:
        return settle_deepep(config, mode, sizes, shape, topology, fp8=fp8)
    if backend == "none":
        return DeepEPSettings(), Choice(capability=CAPABILITY, chosen=f"none (all-gather, all-reduce), mode {mode}")
    rule = "auto: normal if any rank prefills, else low_latency" if mode == "auto" else mode
    how = "torch all-to-all"
    if backend == "symm":
        how = "low-latency steps over symmetric memory in FP8, others by torch all-to-all"
    return DeepEPSettings(), Choice(capability=CAPABILITY, chosen=f"{how}, mode {rule}")
