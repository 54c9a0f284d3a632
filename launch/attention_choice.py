"""What computes attention, a prompt's (`--prefill-attention-backend`) and in general: settled, with their rows of the report."""

from __future__ import annotations

from moesaic.kernels.gpu import SWITCH_VARIABLE
from moesaic.launch.config import DeviceName, PrefillBackend, ServerConfig
from moesaic.launch.errors import ConfigError
from moesaic.launch.hardware import Hardware
from moesaic.launch.report import Choice

CAPABILITY = "prefill attention"
TORCH = f"{SWITCH_VARIABLE}=torch"


def resolve_prefill(config: ServerConfig, device: DeviceName, hardware: Hardware) -> tuple[PrefillBackend, Choice]:
    """Raises ConfigError for a backend that was asked for and can't run."""
    asked, missing = config.prefill_attention_backend, hardware.flashinfer_missing
    if device == "cpu":
        if asked not in ("auto", "torch_native"):
            raise ConfigError(f"--prefill-attention-backend {asked}: the device is cpu; use auto or torch_native")
        return ("own", Choice(capability=CAPABILITY, chosen="own CPU kernels")) if asked == "auto" else _torch_native()
    if asked == "torch_native":
        return _torch_native()
    ours = "triton, our kernel" if hardware.gpu_kernels_missing is None else "torch, our reference"
    if asked == "triton":
        _want_triton("--prefill-attention-backend", hardware)
        return "own", Choice(capability=CAPABILITY, chosen=ours)
    if missing is None:
        return "flashinfer", Choice(capability=CAPABILITY, chosen="flashinfer (against ours: not measured)")
    if asked == "flashinfer":
        raise ConfigError(f"--prefill-attention-backend flashinfer: {missing}; use auto or triton")
    return "own", Choice(capability=CAPABILITY, chosen=ours, refused=(("flashinfer", missing),))


def attention_row(config: ServerConfig, device: DeviceName, hardware: Hardware) -> Choice:
    """Attention to the KV pool, and on CUDA everything else that has a kernel of ours. Raises ConfigError."""
    capability, asked = "attention backend", config.attention_backend
    if device == "cpu":
        if asked == "triton":
            raise ConfigError("--attention-backend triton: the device is cpu; use auto or torch")
        return Choice(capability=capability, chosen="own CPU kernels")
    if asked == "triton":
        _want_triton("--attention-backend", hardware)
    missing = hardware.gpu_kernels_missing
    if asked == "torch" and missing != TORCH:
        raise ConfigError(
            f"--attention-backend torch: on a GPU all of our kernels go together; set the environment variable {TORCH} for torch's"
        )
    if missing is None:
        return Choice(capability=capability, chosen="triton, our kernels")
    refused, accept = (("triton", missing),), f"the environment variable {TORCH}"
    return Choice(capability=capability, chosen="torch", refused=refused, downgrade=missing != TORCH, accept=accept)


def _want_triton(flag: str, hardware: Hardware) -> None:
    if hardware.gpu_kernels_missing is not None:
        raise ConfigError(f"{flag} triton: {hardware.gpu_kernels_missing}; use auto")


def _torch_native() -> tuple[PrefillBackend, Choice]:
    return "torch_native", Choice(capability=CAPABILITY, chosen="torch's scaled_dot_product_attention")
