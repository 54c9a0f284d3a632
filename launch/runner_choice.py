"""What computes the experts: `--moe-runner-backend` and what there is, settled into the backends that may be used, best first.

Pure: why a backend is missing was found out before (`launch/hardware.py`). A backend that was asked for and doesn't fit is refused;
`auto` takes all that fit, and the table of kernels/grouped_backends.py chooses among them by shape.
"""

from __future__ import annotations

from moesaic.kernels.grouped_backends import BACKENDS, NAMES, TABLE, Kind, Name
from moesaic.launch.config import DeviceName, DTypeName, ServerConfig
from moesaic.launch.errors import ConfigError
from moesaic.launch.hardware import Hardware
from moesaic.launch.report import Choice

CAPABILITY = "expert runner"
ACCEPT = "--moe-runner-backend torch"
ON_CPU = "the device is cpu"


def resolve_runners(
    config: ServerConfig, device: DeviceName, kind: Kind, dtype: DTypeName, hardware: Hardware
) -> tuple[tuple[Name, ...], Choice]:
    """The backends and the report's row. `kind`: what rows and weights are; `dtype`: what products of them give.

    Raises ConfigError for one that can't run.
    """
    asked, reasons = config.moe_runner_backend, _reasons(device, kind, dtype, hardware)
    if asked != "auto":
        if asked in reasons:
            raise ConfigError(f"--moe-runner-backend {asked}: {reasons[asked]}; use --moe-runner-backend auto or torch")
        return (asked,), Choice(capability=CAPABILITY, chosen=_described(asked, kind))
    if device == "cpu":
        return ("torch",), Choice(capability=CAPABILITY, chosen="torch", refused=(("device kernels", ON_CPU),))
    refused = tuple((name, reasons[name]) for name in NAMES if name in reasons)
    able = tuple(name for name in NAMES if name not in reasons and name != "torch")
    if not able:
        return ("torch",), Choice(capability=CAPABILITY, chosen="torch", refused=refused, downgrade=True, accept=ACCEPT)
    return able, Choice(capability=CAPABILITY, chosen=_among(able, kind), refused=refused)


def _reasons(device: DeviceName, kind: Kind, dtype: DTypeName, hardware: Hardware) -> dict[Name, str]:
    """Why each backend that can't run can't."""
    if device == "cpu":
        return {name: ON_CPU for name in NAMES if name != "torch"}
    unable = {name: f"has no products of {kind}" for name in NAMES if kind not in BACKENDS[name].kinds}
    found = unable | float32_reasons(kind, dtype) | dict(hardware.runners_missing)
    return {name: found[name] for name in NAMES if name in found}


def float32_reasons(kind: Kind, dtype: DTypeName) -> dict[Name, str]:
    """Against the backends whose FP8 products give bfloat16 alone, for a model that computes in float32."""
    if kind != "fp8" or dtype != "float32":
        return {}
    return dict.fromkeys(("deep_gemm", "cutlass"), "gives bfloat16, and --dtype is float32")


def _among(able: tuple[Name, ...], kind: Kind) -> str:
    if len(able) == 1:
        return _described(able[0], kind)
    sources = {rule.source for rule in TABLE if rule.kind == kind}
    return f"by shape among {', '.join(able)}, {kind} ({'; '.join(sorted(sources))})"


def _described(name: Name, kind: Kind) -> str:
    return name if name == "torch" else f"{name}, {kind}"
