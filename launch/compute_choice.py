"""What the model computes on and in: device, CPU kernels, dtype, quantisation, KV format, collectives; settled, with report rows.

Knows flags, the model's numbers and the machine's; imports no torch. Raises ConfigError for what was asked for and can't be.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.kernels.grouped_backends import Kind, Name
from moesaic.kernels.native.build import SWITCH_VARIABLE
from moesaic.launch.config import DeviceName, DTypeName, KVDTypeName, ServerConfig
from moesaic.launch.errors import ConfigError
from moesaic.launch.fp8_choice import Quantization, resolve_fp8_gemm, resolve_quantization
from moesaic.launch.hardware import Hardware
from moesaic.launch.report import Choice
from moesaic.launch.shared_gpu_rules import Communication, communication, gpus_per_node, too_few_gpus
from moesaic.launch.topology import ModelShape, Topology


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What was settled. Its fields are those of ResolvedConfig; `rows` are the report's."""

    device: DeviceName
    dtype: DTypeName
    quantization: Quantization
    fp8_gemms: tuple[Name, ...]
    kv_dtype: KVDTypeName
    communication: Communication
    rows: tuple[Choice, ...]

    @property
    def expert_kind(self) -> Kind:
        """What the rows and weights of the experts' products are; on a CPU, W8A8 is simulated."""
        return "fp8" if self.quantization == "fp8" and self.device == "cuda" else self.dtype


def choose_compute(config: ServerConfig, shape: ModelShape, topology: Topology, hardware: Hardware) -> Compute:
    """Device first; everything else depends on it."""
    device, device_row = _device(config, topology, hardware)
    dtype, dtype_row = _dtype(config, device)
    quantization, quantization_row = resolve_quantization(config, shape, device, dtype, hardware)
    fp8_gemms, fp8_gemm_row = resolve_fp8_gemm(config, device, quantization, dtype, hardware)
    kv_dtype, kv_row = _kv_dtype(config, device, dtype)
    carrier, communication_row = communication(config, device, topology)
    kernels_row = _cpu_kernels_row(hardware, device)
    rows = (device_row, kernels_row, dtype_row, quantization_row, fp8_gemm_row, kv_row, communication_row)
    return Compute(
        device=device,
        dtype=dtype,
        quantization=quantization,
        fp8_gemms=fp8_gemms,
        kv_dtype=kv_dtype,
        communication=carrier,
        rows=tuple(row for row in rows if row is not None),
    )


def _device(config: ServerConfig, topology: Topology, hardware: Hardware) -> tuple[DeviceName, Choice]:
    if config.device == "cpu":
        return "cpu", Choice(capability="device", chosen=f"cpu ({hardware.num_cores} cores)")
    wanted = gpus_per_node(config, topology)
    reason = hardware.cuda_missing
    if 0 < hardware.num_cuda_devices < wanted:
        reason = too_few_gpus(config, topology, hardware.num_cuda_devices)
    if hardware.num_cuda_devices >= wanted:
        return "cuda", Choice(capability="device", chosen=f"cuda ({hardware.num_cuda_devices} devices)")
    if config.device == "cuda":
        raise ConfigError(f"--device cuda: {reason}; use --device cpu, or install a CUDA build of torch on a machine with GPUs")
    chosen = f"cpu ({hardware.num_cores} cores)"
    return "cpu", Choice(capability="device", chosen=chosen, refused=(("cuda", reason),), downgrade=True, accept="--device cpu")


def _dtype(config: ServerConfig, device: DeviceName) -> tuple[DTypeName, Choice]:
    if config.dtype != "auto":
        return config.dtype, Choice(capability="dtype", chosen=config.dtype)
    if device == "cuda":
        return "bfloat16", Choice(capability="dtype", chosen="bfloat16")
    # Not a downgrade: float32 is the more exact of the two, and the faster one on most CPUs.
    return "float32", Choice(capability="dtype", chosen="float32", refused=(("bfloat16", "slower than float32 on most CPUs"),))


def _kv_dtype(config: ServerConfig, device: DeviceName, dtype: DTypeName) -> tuple[KVDTypeName, Choice]:
    if config.kv_cache_dtype == "fp8_e4m3":
        how = ", computed by torch, slowly: a CPU has no FP8" if device == "cpu" else ""
        return "float8_e4m3fn", Choice(capability="KV cache", chosen=f"FP8 (e4m3), scale 1{how}")
    if config.kv_cache_dtype != "auto" and dtype != "bfloat16":
        raise ConfigError(f"--kv-cache-dtype {config.kv_cache_dtype}: the model computes in {dtype}; use auto or fp8_e4m3")
    return dtype, Choice(capability="KV cache", chosen=dtype)


def _cpu_kernels_row(hardware: Hardware, device: DeviceName) -> Choice:
    """Compiled C for fp32 tensors on the CPU; whatever they don't cover is torch's."""
    capability, best = "CPU kernels", "compiled C"
    if device == "cuda":
        return Choice(capability=capability, chosen="not used", refused=((best, "the device is cuda"),))
    if hardware.cpu_kernels_missing is None:
        return Choice(capability=capability, chosen=best)
    refused = ((best, hardware.cpu_kernels_missing),)
    wanted = f"{SWITCH_VARIABLE}=torch"
    return Choice(
        capability=capability,
        chosen="torch",
        refused=refused,
        downgrade=hardware.cpu_kernels_missing != wanted,
        accept=f"the environment variable {wanted}",
    )
