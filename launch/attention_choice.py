"""What computes attention, a prompt's (`--prefill-attention-backend`) and in general: settled, with their rows of the report."""

from __future__ import annotations

from moesaic.launch.config import DeviceName, PrefillBackend, ServerConfig
from moesaic.launch.errors import ConfigError
from moesaic.launch.hardware import Hardware
from moesaic.launch.report import Choice

CAPABILITY = "prefill attention"
NOT_BUILT = "not built yet"


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


def attention_row(config: ServerConfig, device: DeviceName) -> Choice:
    """Only the torch implementation exists, which on a GPU is less than one may expect."""
    reason = "the device is cpu" if device == "cpu" else NOT_BUILT
    return Choice(
        capability="attention backend",
        chosen="torch",
        refused=(("device kernels", reason),),
        downgrade=device == "cuda" and config.attention_backend == "auto",
        accept="--attention-backend torch",
    )


def _torch_native() -> tuple[PrefillBackend, Choice]:
    return "torch_native", Choice(capability=CAPABILITY, chosen="torch's scaled_dot_product_attention")
