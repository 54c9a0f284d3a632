"""What computes a prompt's attention: `--prefill-attention-backend` and what there is, settled. A row of the resolution report."""

from __future__ import annotations

from moesaic.launch.config import DeviceName, PrefillBackend, ServerConfig
from moesaic.launch.errors import ConfigError
from moesaic.launch.hardware import Hardware
from moesaic.launch.report import Choice

CAPABILITY = "prefill attention"


def resolve_prefill(config: ServerConfig, device: DeviceName, hardware: Hardware) -> tuple[PrefillBackend, Choice]:
    """Raises ConfigError for a backend that was asked for and can't run."""
    asked, missing = config.prefill_attention_backend, hardware.flashinfer_missing
    if device == "cpu":
        if asked not in ("auto", "torch_native"):
            raise ConfigError(f"--prefill-attention-backend {asked}: the device is cpu; use auto or torch_native")
        return ("own", Choice(capability=CAPABILITY, chosen="own CPU kernels")) if asked == "auto" else _torch_native()
    if asked == "torch_native":
        return _torch_native()
    if asked == "triton":
        return "own", Choice(capability=CAPABILITY, chosen="triton, our kernel")
    if missing is None:
        return "flashinfer", Choice(capability=CAPABILITY, chosen="flashinfer (against ours: not measured)")
    if asked == "flashinfer":
        raise ConfigError(f"--prefill-attention-backend flashinfer: {missing}; use auto or triton")
    return "own", Choice(capability=CAPABILITY, chosen="triton, our kernel", refused=(("flashinfer", missing),))


def _torch_native() -> tuple[PrefillBackend, Choice]:
    return "torch_native", Choice(capability=CAPABILITY, chosen="torch's scaled_dot_product_attention")
