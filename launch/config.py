"""The server's configuration: what was asked for (`ServerConfig`) and what it came to (`ResolvedConfig`).

`ServerConfig` has one field per command-line flag, under the flag's name in snake_case; its defaults are the flags'
defaults, and "auto" or None means "choose for me". `ResolvedConfig` is made from it once, by `launch/resolution.py`:
nothing in it is "auto", and the engine reads nothing else. The one exception is `dispatch_mode`, whose "auto" is a rule
that is applied anew in every step.

Knows no parser, no process, no model. Both are frozen and picklable.
Terms: "per DP rank" means for one data-parallel scheduler; a rank is one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic.kernels.grouped_backends import Name as RunnerName
from moesaic.moe.deepep_config import DeepEPSettings

DispatchMode = Literal["auto", "normal", "low_latency"]
RecorderMode = Literal["stat", "per_pass", "per_token"]
A2ABackend = Literal["none", "torch", "symm", "deepep", "deepep_v2"]
TransferBackend = Literal["none", "tcp", "nixl", "mooncake"]
DeviceName = Literal["cpu", "cuda"]
DTypeName = Literal["float32", "bfloat16"]
PrefillBackend = Literal["own", "torch_native", "flashinfer"]
KVDTypeName = Literal["float32", "bfloat16", "float8_e4m3fn"]


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """All flags of `moesaic serve`.

    Requests and prefill tokens count for the whole server, as in SGLang; pool sizes per DP rank.
    """

    # Model
    model_path: str
    tokenizer_path: str | None = None
    served_model_name: str | None = None
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["auto", "none", "fp8"] = "auto"
    context_length: int | None = None
    # HTTP
    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str | None = None
    enable_metrics: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_level_http: Literal["debug", "info", "warning", "error"] | None = None
    log_requests: bool = False
    log_requests_level: Literal[0, 1, 2, 3] = 2
    skip_server_warmup: bool = False
    max_queued_requests: int | None = None
    # Parallel layout
    tp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    enable_dp_attention: bool = False
    enable_dp_lm_head: bool = False
    moe_dense_tp_size: int | None = None
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    dist_timeout: int = 60
    load_balance_method: Literal["auto", "round_robin", "total_tokens", "total_requests"] = "auto"
    # Experts
    moe_a2a_backend: A2ABackend = "none"
    moe_runner_backend: RunnerName | Literal["auto"] = "auto"
    fp8_gemm_backend: RunnerName | Literal["auto"] = "auto"
    deepep_mode: DispatchMode = "auto"
    deepep_max_dispatch_tokens_per_rank: int = 128
    deepep_config: str | None = None
    # Placement of experts
    enable_eplb: bool = False
    ep_num_redundant_experts: int = 0
    ep_dispatch_algorithm: Literal["static", "dynamic", "probability", "balanced", "activated"] | None = None
    init_expert_location: str = "trivial"
    eplb_algorithm: Literal["auto", "deepseek", "deepseek_hierarchical"] = "auto"
    eplb_rebalance_num_iterations: int = 1000
    eplb_rebalance_layers_per_chunk: int | None = None
    eplb_min_rebalancing_utilization_threshold: float = 1.0
    expert_distribution_recorder_mode: RecorderMode = "stat"
    expert_distribution_recorder_buffer_size: int = 1000
    expert_balancedness_report_mode: Literal["off", "server_log"] = "off"
    # Overlap of computation and communication
    enable_two_batch_overlap: bool = False
    enable_single_batch_overlap: bool = False
    tbo_token_distribution_threshold: float = 0.48
    tbo_profile: str | None = None
    # Prefill/decode disaggregation
    disaggregation_mode: Literal["null", "prefill", "decode"] = "null"
    disaggregation_transfer_backend: Literal["auto", "tcp", "nixl", "mooncake"] = "auto"
    disaggregation_bootstrap_port: int = 8998
    disaggregation_ib_device: str | None = None
    disaggregation_timeout: int = 120
    disaggregation_checksum: bool = False
    num_reserved_decode_tokens: int = 512
    disaggregation_host_kv_gb: float | None = None
    # Memory and scheduling
    mem_fraction_static: float | None = None
    max_running_requests: int | None = None
    max_total_tokens: int | None = None
    chunked_prefill_size: int | None = None
    max_prefill_tokens: int = 16384
    page_size: int | None = None
    kv_cache_dtype: Literal["auto", "bf16", "bfloat16", "fp8_e4m3"] = "auto"
    schedule_policy: Literal["fcfs", "lpm"] = "fcfs"
    disable_radix_cache: bool = False
    radix_eviction_policy: Literal["lru"] = "lru"
    disable_overlap_schedule: bool = False
    disable_cuda_graph: bool = False
    cuda_graph_bs: tuple[int, ...] | None = None
    cuda_graph_max_bs: int | None = None
    # Device and process
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks_per_gpu: int = 1
    attention_backend: Literal["auto", "triton", "torch"] = "auto"
    prefill_attention_backend: Literal["auto", "triton", "torch_native", "flashinfer"] = "auto"
    num_threads: int | None = None
    random_seed: int | None = None
    watchdog_timeout: int = 300
    decode_log_interval: int = 40
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """What the ranks run with; made once, the same on every rank (only the device index follows from the rank's place).

    Sizes: `chunked_prefill_tokens_per_dp` prompt tokens at most in one step of one DP rank;
    `max_running_requests_per_dp` sequences at most decoding on it; `max_total_tokens` KV tokens of one DP rank (None:
    what `mem_fraction_static` leaves). `quantization`: "none" computes in `dtype` (FP8 checkpoint weights are
    dequantised at load); "fp8" is W8A8, weights as stored, activations quantised per token and 128 channels.
    `dispatch_mode`: the rule of which layout a step takes; "auto" = normal if any rank prefills, else low-latency.
    `two_batch_overlap`: from which step sizes on is measured when the ranks start, or read (`RankSpec.calibration`);
    `single_batch_overlap` holds for the steps that run straight. `overlap_schedule`: a step's results are handled while
    the next one computes.
    `communication_backend`: "staged" is gloo with device tensors passing through host memory (`launch/engine/staged_group.py`).
    `ranks_per_gpu`: consecutive ranks of a node that share a device.
    `moe_runner_backends`: what computes the experts' products; of several the table of kernels/grouped_backends.py chooses
    by the product's shape. `fp8_gemm_backends`: the same for all other FP8 products.
    `deepep`: what DeepEP is made with, where it is the `moe_a2a_backend`.
    `transfer_backend`: what moves KV between a prefill and a decode instance; "none" for a server without a role.
    `cuda_graph_rows`: requests of a DP rank that decode steps are captured for, ascending; (): none are.
    `dist_timeout` and `watchdog_timeout` are in seconds. `recorder_buffer_size` -1: any number of windows. `decode_log_interval`:
    steps of a DP rank between two log lines.
    """

    model_path: str
    load_format: Literal["safetensors", "dummy"]
    device: DeviceName
    ranks_per_gpu: int
    dtype: DTypeName
    kv_dtype: KVDTypeName
    quantization: Literal["none", "fp8"]
    context_length: int
    communication_backend: Literal["gloo", "nccl", "staged"]
    prefill_attention_backend: PrefillBackend
    moe_a2a_backend: A2ABackend
    moe_runner_backends: tuple[RunnerName, ...]
    fp8_gemm_backends: tuple[RunnerName, ...]
    dispatch_mode: DispatchMode
    max_dispatch_tokens_per_rank: int
    deepep: DeepEPSettings
    enable_dp_lm_head: bool
    two_batch_overlap: bool
    single_batch_overlap: bool
    tbo_token_distribution_threshold: float
    overlap_schedule: bool
    disaggregation_mode: Literal["null", "prefill", "decode"]
    transfer_backend: TransferBackend
    mem_fraction_static: float
    max_running_requests_per_dp: int
    max_total_tokens: int | None
    chunked_prefill_tokens_per_dp: int
    page_size: int
    cuda_graph_rows: tuple[int, ...]
    recorder_mode: RecorderMode
    recorder_buffer_size: int
    schedule_policy: Literal["fcfs", "lpm"]
    enable_prefix_cache: bool
    num_threads: int
    dist_timeout: int
    watchdog_timeout: int
    load_balance_method: Literal["round_robin", "total_tokens", "total_requests"]
    max_queued_requests: int
    log_level: Literal["debug", "info", "warning", "error"]
    decode_log_interval: int = 40

    @property
    def fp8_weights(self) -> bool:
        """Whether FP8 matrices stay as stored and compute in FP8 (all but kv_b_proj); on a CPU W8A8 is simulated."""
        return self.quantization == "fp8" and self.device == "cuda"
