"""What is computed in FP8, settled: `--quantization` and `--fp8-gemm-backend`, with their rows of the resolution report.

Pure. On CUDA an FP8 checkpoint computes in FP8 wherever its matrices are stored so, but for kv_b_proj; on a CPU, W8A8 is simulated
with dequantised weights, and only on demand. What computes the experts is runner_choice.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from moesaic.kernels.grouped_backends import DENSE_NAMES, TABLE, Name
from moesaic.launch.config import DeviceName, DTypeName, ServerConfig
from moesaic.launch.conflicts import Conflict, refuse
from moesaic.launch.errors import ConfigError
from moesaic.launch.hardware import Hardware
from moesaic.launch.model_rules import block_conflicts, fp8_weight_conflicts
from moesaic.launch.report import Choice
from moesaic.launch.runner_choice import ON_CPU, float32_reasons
from moesaic.launch.topology import ModelShape, Topology

Quantization = Literal["none", "fp8"]
CAPABILITY = "FP8 linear layers"
FP8_PARTS = "attention projections, dense layers, shared and routed experts"
NOT_FP8 = (
    ("kv_b_proj in FP8", "its halves are absorbed into queries and outputs, which are not quantised"),
    ("embedding, head, norms and gates in FP8", "the checkpoint stores them plain"),
)


def resolve_quantization(
    config: ServerConfig, shape: ModelShape, device: DeviceName, dtype: DTypeName, hardware: Hardware
) -> tuple[Quantization, Choice]:
    """What runs, and the report's row. Raises ConfigError for FP8 that was asked for and can't be."""
    if config.quantization == "fp8" and not shape.fp8_checkpoint:
        raise ConfigError(
            "--quantization fp8: the checkpoint is not FP8 (its config.json has no quantization_config of 128x128 "
            "blocks); leave --quantization out, or take an FP8 checkpoint"
        )
    if not shape.fp8_checkpoint:
        return "none", Choice(capability="quantisation", chosen=f"none: weights in {dtype}")
    if device == "cpu":
        return _on_a_cpu(config, dtype)
    if config.quantization == "fp8":
        refuse(fp8_weight_conflicts(config, shape))
        return "fp8", _in_fp8(dtype)
    reason = "--quantization none" if config.quantization == "none" else _reason_against(config, shape, dtype, hardware)
    if reason is None:
        return "fp8", _in_fp8(dtype)
    return "none", Choice(
        capability="quantisation",
        chosen=f"FP8 weights dequantised to {dtype} at load",
        refused=(("W8A8", reason),),
        downgrade=config.quantization == "auto",
        accept="--quantization none",
    )


def _in_fp8(dtype: DTypeName) -> Choice:
    chosen = f"W8A8, weights as stored, activations per token and 128 channels: {FP8_PARTS}; the rest in {dtype}, gates in float32"
    return Choice(capability="quantisation", chosen=chosen, refused=NOT_FP8)


def _on_a_cpu(config: ServerConfig, dtype: DTypeName) -> tuple[Quantization, Choice]:
    if config.quantization == "fp8":
        chosen = "W8A8: FP8 weights, activations per token and 128 channels, simulated"
        return "fp8", Choice(capability="quantisation", chosen=chosen)
    refused = (("W8A8", "simulated and slow on a CPU"),)
    return "none", Choice(capability="quantisation", chosen=f"FP8 weights dequantised to {dtype} at load", refused=refused)


def _reason_against(config: ServerConfig, shape: ModelShape, dtype: DTypeName, hardware: Hardware) -> str | None:
    """Why `auto` does not compute in FP8 on this machine with this layout; None if it does."""
    conflict = next(fp8_conflicts(config, shape), None)
    if conflict is not None:
        return f"{conflict.reason} ({conflict.remedy})"
    missing = _reasons(dtype, hardware)
    if all(name in missing for name in DENSE_NAMES if name != "torch"):
        return "no kernels for it: " + "; ".join(f"{name} {reason}" for name, reason in missing.items())
    return None


def fp8_conflicts(config: ServerConfig, shape: ModelShape) -> Iterator[Conflict]:
    """Sizes and cuts that keep this layout of the model from computing in FP8."""
    yield from block_conflicts(config, shape, Topology.from_config(config))
    yield from fp8_weight_conflicts(config, shape)


def _reasons(dtype: DTypeName, hardware: Hardware) -> dict[Name, str]:
    """Why each backend that can't compute a dense FP8 product on CUDA can't."""
    missing = dict(hardware.runners_missing) | float32_reasons("fp8", dtype)
    return {name: missing[name] for name in DENSE_NAMES if name in missing}


def resolve_fp8_gemm(
    config: ServerConfig, device: DeviceName, quantization: Quantization, dtype: DTypeName, hardware: Hardware
) -> tuple[tuple[Name, ...], Choice | None]:
    """The backends of dense FP8 products and the report's row; none where nothing is stored in FP8.

    Raises ConfigError for a backend that was asked for and can't run, or has nothing to do.
    """
    asked = config.fp8_gemm_backend
    flag = f"--fp8-gemm-backend {asked}"
    if device == "cpu" or quantization == "none":
        if asked not in ("auto", "torch"):
            reason = ON_CPU if device == "cpu" else "nothing is computed in FP8 (see --quantization)"
            raise ConfigError(f"{flag}: {reason}; leave it out")
        return ("torch",), None
    reasons = _reasons(dtype, hardware)
    if asked != "auto":
        if asked in reasons:
            raise ConfigError(f"{flag}: {reasons[asked]}; use --fp8-gemm-backend auto or torch")
        return (asked,), Choice(capability=CAPABILITY, chosen=asked)
    refused = tuple(reasons.items())
    able = tuple(name for name in DENSE_NAMES if name not in reasons and name != "torch")
    if not able:
        chosen, accept = "torch: dequantised at every product", "--fp8-gemm-backend torch"
        return ("torch",), Choice(capability=CAPABILITY, chosen=chosen, refused=refused, downgrade=True, accept=accept)
    return able, Choice(capability=CAPABILITY, chosen=_among(able), refused=refused)


def _among(able: tuple[Name, ...]) -> str:
    if len(able) == 1:
        return able[0]
    sources = sorted({rule.source for rule in TABLE if rule.layout == "dense"})
    return f"by shape among {', '.join(able)} ({'; '.join(sources)})"
