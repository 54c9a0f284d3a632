"""Every "auto" is settled once, every lesser choice is named, and --strict allows none."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from moesaic.launch import hardware
from moesaic.launch.config import ResolvedConfig, ServerConfig
from moesaic.launch.disaggregation.backends import missing_reason
from moesaic.launch.errors import ConfigError
from moesaic.launch.hardware import Hardware
from moesaic.launch.report import Choice, report_rows
from moesaic.launch.resolution import Resolution, resolve
from moesaic.launch.topology import ModelShape

SHAPE = ModelShape(
    num_heads=8,
    num_experts=16,
    moe_intermediate_size=128,
    intermediate_size=256,
    vocab_size=512,
    context_length=1024,
)
FP8_SHAPE = ModelShape(
    num_heads=8,
    num_experts=16,
    moe_intermediate_size=128,
    intermediate_size=256,
    vocab_size=512,
    context_length=1024,
    fp8_checkpoint=True,
)
LAPTOP = Hardware(num_cores=8)
GPU_BOX = Hardware(num_cores=64, num_cuda_devices=8, runners_missing=(("deep_gemm", "no module"), ("cutlass", "no module")))
BARE_GPU_BOX = Hardware(
    num_cores=64,
    num_cuda_devices=8,
    gpu_kernels_missing="the package triton is not installed",
    runners_missing=tuple((name, "sm_80") for name in ("deep_gemm", "cutlass", "triton")),
)
DP2: dict[str, Any] = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True, "moe_a2a_backend": "torch"}


def settle(shape: ModelShape = SHAPE, hardware: Hardware = LAPTOP, **flags: Any) -> Resolution:
    return resolve(ServerConfig(model_path="m", **flags), shape, hardware)


def row(resolution: Resolution, capability: str) -> dict[str, Any]:
    return next(row for row in report_rows(resolution.choices) if row["capability"] == capability)


@pytest.mark.parametrize("hardware", [LAPTOP, GPU_BOX])
def test_nothing_is_left_to_choose(hardware: Hardware) -> None:
    config = settle(hardware=hardware).config

    unsettled = {field.name for field in fields(ResolvedConfig) if getattr(config, field.name) in ("auto", None)}
    # What memory leaves is known to the ranks alone.
    assert unsettled == {"max_total_tokens"}


def test_a_laptop_computes_in_float32_over_gloo() -> None:
    config = settle(**DP2).config

    assert (config.device, config.dtype, config.communication_backend) == ("cpu", "float32", "gloo")
    assert (config.page_size, config.num_threads) == (16, 4)


def test_a_gpu_box_computes_in_bfloat16_over_nccl() -> None:
    config = settle(hardware=GPU_BOX, **DP2).config

    assert (config.device, config.dtype, config.communication_backend) == ("cuda", "bfloat16", "nccl")
    assert config.page_size == 64


def test_explicit_values_are_kept() -> None:
    config = settle(dtype="bfloat16", page_size=4, num_threads=3, context_length=100).config

    assert (config.dtype, config.page_size, config.num_threads) == ("bfloat16", 4, 3)
    assert config.context_length == 100


def test_server_wide_sizes_are_shared_among_dp_ranks() -> None:
    config = settle(**DP2, max_running_requests=64, chunked_prefill_size=512).config

    assert config.max_running_requests_per_dp == 32
    assert config.chunked_prefill_tokens_per_dp == 256
    assert settle(**DP2, chunked_prefill_size=512, max_prefill_tokens=100).config.chunked_prefill_tokens_per_dp == 100
    assert settle(chunked_prefill_size=-1).config.chunked_prefill_tokens_per_dp == SHAPE.context_length


@pytest.mark.parametrize(
    ("backend", "mode", "settled"),
    [
        ("none", "auto", "normal"),
        ("none", "normal", "normal"),
        ("torch", "auto", "auto"),
        ("torch", "normal", "normal"),
    ],
)
def test_the_dispatch_mode(backend: str, mode: str, settled: str) -> None:
    resolution = settle(moe_a2a_backend=backend, deepep_mode=mode)

    assert resolution.config.dispatch_mode == settled
    assert f"mode {settled}" in row(resolution, "dispatch")["chosen"]


@pytest.mark.parametrize("hardware", [LAPTOP, GPU_BOX])
def test_scheduling_overlaps_the_model_unless_it_is_switched_off(hardware: Hardware) -> None:
    on, off = settle(hardware=hardware, tp_size=2), settle(hardware=hardware, tp_size=2, disable_overlap_schedule=True)

    assert on.config.overlap_schedule and not off.config.overlap_schedule
    assert row(on, "overlap schedule")["chosen"].startswith("on")
    assert row(off, "overlap schedule")["refused"] == [{"candidate": "on", "reason": "--disable-overlap-schedule"}]


def test_scheduling_does_not_overlap_the_model_where_a_forward_never_waits() -> None:
    alone = {"tp_size": 1, "dp_size": 1, "moe_a2a_backend": "none"}
    laptop, gpu = settle(hardware=LAPTOP, **alone), settle(hardware=GPU_BOX, **alone)

    assert not laptop.config.overlap_schedule and gpu.config.overlap_schedule
    assert "one CPU rank" in row(laptop, "overlap schedule")["refused"][0]["reason"]


@pytest.mark.parametrize("backend", ["none", "torch"])
def test_low_latency_is_refused_while_a_step_may_exceed_its_cap(backend: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(moe_a2a_backend=backend, deepep_mode="low_latency")

    message = str(caught.value)
    assert "--deepep-max-dispatch-tokens-per-rank 128" in message
    assert "two ways out: --deepep-mode auto" in message


def test_both_ways_out_of_the_low_latency_conflict_work() -> None:
    flags: dict[str, Any] = {**DP2, "deepep_mode": "low_latency"}

    settle(**flags | {"deepep_mode": "auto"})
    # As the message proposes: beside a prompt 63 of 64 running requests per DP rank decode, which leaves room for 65 tokens of it.
    assert settle(**flags, chunked_prefill_size=130).config.dispatch_mode == "low_latency"
    settle(**flags, deepep_max_dispatch_tokens_per_rank=1087)


def test_a_decode_instance_may_run_as_many_requests_as_the_layout_takes() -> None:
    """The published decode instances run 256 per GPU with a cap of 256 tokens."""
    flags: dict[str, Any] = {**DP2, "disaggregation_mode": "decode", "max_running_requests": 512}

    config = settle(**flags, deepep_max_dispatch_tokens_per_rank=256).config
    assert (config.max_running_requests_per_dp, config.chunked_prefill_tokens_per_dp) == (256, 1)


def test_ranks_of_an_attention_tp_group_share_the_low_latency_cap() -> None:
    flags: dict[str, Any] = {"tp_size": 4, "deepep_mode": "low_latency", "max_running_requests": 100}

    # 99 decode beside the one that prefills.
    settle(**flags, moe_a2a_backend="torch", chunked_prefill_size=413)
    with pytest.raises(ConfigError):
        settle(**flags, moe_a2a_backend="torch", chunked_prefill_size=414)
    with pytest.raises(ConfigError):
        settle(**flags, moe_a2a_backend="none", chunked_prefill_size=412)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"moe_a2a_backend": "deepep"}, "DeepEP moves tokens between GPUs, and the device is cpu (torch sees no CUDA device); use"),
        (
            {"moe_runner_backend": "triton"},
            "--moe-runner-backend triton: the device is cpu; use",
        ),
        ({"device": "cuda"}, "--device cuda: torch sees no CUDA device"),
        ({"quantization": "fp8"}, "--quantization fp8: the checkpoint is not FP8"),
        ({"context_length": 2000}, "--context-length 2000: the model reaches 1024"),
        ({**DP2, "max_running_requests": 1}, "--max-running-requests 1 --dp-size 2"),
        ({"tp_size": 3}, "8 attention heads"),
    ],
)
def test_what_was_asked_for_and_cannot_run_is_refused(flags: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(**flags)

    assert wanted in str(caught.value)


def test_falling_back_to_the_cpu_is_a_downgrade_that_strict_refuses() -> None:
    missing = Hardware(num_cores=8, cuda_missing="torch 2.13.0 is a CPU build")

    device = row(settle(hardware=missing), "device")

    assert device["automatic_downgrade"] is True
    assert device["refused"] == [{"candidate": "cuda", "reason": "torch 2.13.0 is a CPU build"}]
    with pytest.raises(ConfigError, match=r"device: cuda refused .* to accept it: --device cpu"):
        settle(hardware=missing, strict=True)


def test_strict_accepts_choices_that_were_written_down() -> None:
    settle(strict=True, device="cpu")
    settle(strict=True, hardware=GPU_BOX, disable_cuda_graph=True, moe_runner_backend="torch")


def test_strict_names_every_downgrade_and_how_to_accept_it() -> None:
    with pytest.raises(ConfigError) as caught:
        settle(FP8_SHAPE, strict=True, hardware=BARE_GPU_BOX)

    lines = str(caught.value).splitlines()
    accepted = [line.rpartition("to accept it: ")[2] for line in lines[1:]]
    assert accepted == [
        "--quantization none",
        "the environment variable MOESAIC_GPU_KERNELS=torch",
        "--moe-runner-backend torch",
        "--disable-cuda-graph",
    ]


def test_on_a_gpu_experts_are_computed_by_what_fits_and_the_table_chooses_among_several() -> None:
    several = settle(hardware=Hardware(num_cores=64, num_cuda_devices=8))
    assert several.config.moe_runner_backends == ("deep_gemm", "cutlass", "triton")
    chosen = row(several, "expert runner")["chosen"]
    assert chosen.startswith("by shape among deep_gemm, cutlass, triton, bfloat16 (not measured")

    one = settle(hardware=GPU_BOX)
    assert one.config.moe_runner_backends == ("triton",)
    assert row(one, "expert runner")["refused"] == [
        {"candidate": "deep_gemm", "reason": "no module"},
        {"candidate": "cutlass", "reason": "no module"},
    ]
    assert settle(hardware=BARE_GPU_BOX).config.moe_runner_backends == ("torch",)
    assert settle(hardware=GPU_BOX, moe_runner_backend="triton").config.moe_runner_backends == ("triton",)
    with pytest.raises(ConfigError, match="--moe-runner-backend deep_gemm: no module"):
        settle(hardware=GPU_BOX, moe_runner_backend="deep_gemm")
    with pytest.raises(ConfigError, match="--moe-runner-backend cutlass: has no products of float32"):
        settle(hardware=Hardware(num_cores=1, num_cuda_devices=8), dtype="float32", moe_runner_backend="cutlass")


@pytest.mark.parametrize("quantization", ["auto", "fp8"])
def test_an_fp8_checkpoint_computes_in_fp8_on_a_gpu_and_the_report_says_what_does_not(quantization: str) -> None:
    resolution = settle(FP8_SHAPE, hardware=GPU_BOX, quantization=quantization)
    assert resolution.config.quantization == "fp8" and resolution.config.fp8_weights
    assert resolution.config.fp8_gemm_backends == resolution.config.moe_runner_backends == ("triton",)
    words = row(resolution, "quantisation")
    assert "attention projections, dense layers, shared and routed experts; the rest in bfloat16" in words["chosen"]
    assert words["refused"][0]["candidate"] == "kv_b_proj in FP8" and not words["automatic_downgrade"]
    assert row(resolution, "FP8 linear layers")["refused"] == [{"candidate": "deep_gemm", "reason": "no module"}]
    in_float32 = settle(FP8_SHAPE, Hardware(num_cores=1, num_cuda_devices=1), quantization=quantization, dtype="float32").config
    assert in_float32.fp8_gemm_backends == in_float32.moe_runner_backends == ("triton",), "the others give bfloat16 alone"
    assert not settle(FP8_SHAPE, quantization="fp8").config.fp8_weights, "simulated on a CPU"


@pytest.mark.parametrize(
    ("changes", "flags", "reason"),
    [
        ({"hidden_size": 192}, {}, "weights in FP8 want multiples of 128, and hidden_size is 192 (--quantization none)"),
        ({"q_lora_rank": 200}, {}, "multiples of 16 bytes, and q_lora_rank is 200"),
        ({"qk_head_dim": 80}, {"tp_size": 2, "ep_size": 2}, "attention TP cuts num_heads x query head dim = 640 into 2 parts"),
        ({"num_shared_experts": 1}, {"tp_size": 2, "ep_size": 2}, "attention TP cuts the shared experts' width = 128 into 2 parts"),
    ],
)
def test_sizes_that_fp8_does_not_suit_are_dequantised_or_refused(changes: Any, flags: Any, reason: str) -> None:
    shape = replace(FP8_SHAPE, **changes)
    left = settle(shape, GPU_BOX, **flags)
    words = row(left, "quantisation")
    assert left.config.quantization == "none" and words["automatic_downgrade"]
    assert reason in words["refused"][0]["reason"]
    with pytest.raises(ConfigError) as caught:
        settle(shape, GPU_BOX, quantization="fp8", **flags)
    assert reason.partition(" (")[0] in str(caught.value)


def test_a_gpu_without_fp8_kernels_dequantises_unless_told_otherwise() -> None:
    left = settle(FP8_SHAPE, BARE_GPU_BOX)
    assert left.config.quantization == "none" and left.config.fp8_gemm_backends == ("torch",)
    (refused,) = row(left, "quantisation")["refused"]
    assert refused["reason"] == "no kernels for it: deep_gemm sm_80; triton sm_80"
    told = settle(FP8_SHAPE, BARE_GPU_BOX, quantization="fp8")
    assert told.config.fp8_weights and row(told, "FP8 linear layers")["automatic_downgrade"]


def test_a_backend_of_fp8_products_that_can_not_run_or_has_nothing_to_do_is_refused() -> None:
    assert settle(FP8_SHAPE, GPU_BOX, fp8_gemm_backend="triton").config.fp8_gemm_backends == ("triton",)
    both = settle(FP8_SHAPE, Hardware(num_cores=1, num_cuda_devices=1))
    assert both.config.fp8_gemm_backends == ("deep_gemm", "triton")
    assert row(both, "FP8 linear layers")["chosen"].startswith("by shape among deep_gemm, triton (not measured")
    for shape, box, message in (
        (FP8_SHAPE, GPU_BOX, "--fp8-gemm-backend deep_gemm: no module; use --fp8-gemm-backend auto or torch"),
        (SHAPE, GPU_BOX, "--fp8-gemm-backend deep_gemm: nothing is computed in FP8"),
        (FP8_SHAPE, LAPTOP, "--fp8-gemm-backend deep_gemm: the device is cpu"),
    ):
        with pytest.raises(ConfigError, match=message):
            settle(shape, box, fp8_gemm_backend="deep_gemm")


def test_a_gpu_that_can_not_be_asked_leaves_torch_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "ASK_RUNNERS", "raise SystemExit('no driver')")
    reasons = dict(hardware._missing_runners())
    assert reasons.keys() == {"deep_gemm", "cutlass", "triton"}
    assert "asking for it failed: no driver" in reasons["triton"]
    monkeypatch.setattr(hardware, "ASK_RUNNERS", "print('a library says hello'); print('[[\"cutlass\", \"not installed\"]]')")
    assert hardware._missing_runners() == (("cutlass", "not installed"),)
    monkeypatch.setenv("MOESAIC_GPU_KERNELS", "torch")
    assert dict(hardware._missing_runners())["deep_gemm"] == "MOESAIC_GPU_KERNELS=torch"


def test_symm_wants_one_node_of_gpus_fp8_experts_and_whole_outputs() -> None:
    symm: dict[str, Any] = {**DP2, "moe_a2a_backend": "symm"}
    resolution = settle(FP8_SHAPE, GPU_BOX, **symm, quantization="fp8")
    assert resolution.config.moe_a2a_backend == "symm"
    assert row(resolution, "dispatch")["chosen"].startswith("low-latency steps over symmetric memory in FP8")
    with pytest.raises(ConfigError, match="only CUDA devices write each other's memory, and the device is cpu"):
        settle(FP8_SHAPE, **symm, quantization="fp8")
    with pytest.raises(ConfigError) as caught:
        settle(FP8_SHAPE, BARE_GPU_BOX, **symm, nnodes=2, dist_init_addr="a:1", enable_single_batch_overlap=True)
    for reason in (
        "kernels are Triton's: sm_80",
        "--nnodes 2: only the GPUs of one node",
        "tokens travel in FP8",
        "not two halves",
    ):
        assert reason in str(caught.value)


def test_too_few_gpus_are_named() -> None:
    with pytest.raises(ConfigError, match="4 ranks per node, and torch sees 2 CUDA devices"):
        settle(hardware=Hardware(num_cores=8, num_cuda_devices=2), tp_size=4, device="cuda")


def test_an_fp8_checkpoint_is_dequantised_on_a_cpu_unless_w8a8_is_asked_for() -> None:
    assert settle(FP8_SHAPE).config.quantization == "none"
    assert "dequantised to float32" in row(settle(FP8_SHAPE), "quantisation")["chosen"]
    assert settle(FP8_SHAPE, quantization="fp8").config.quantization == "fp8"


def test_a_prompts_attention_is_flashinfers_where_it_is_installed() -> None:
    flashinfer = replace(GPU_BOX, flashinfer_missing=None)
    asked = "prefill_attention_backend"

    assert settle().config.prefill_attention_backend == "own"
    assert settle(prefill_attention_backend="torch_native").config.prefill_attention_backend == "torch_native"
    assert settle(hardware=flashinfer).config.prefill_attention_backend == "flashinfer"
    assert settle(hardware=flashinfer, **{asked: "triton"}).config.prefill_attention_backend == "own"
    assert row(settle(hardware=GPU_BOX), "prefill attention")["refused"][0]["candidate"] == "flashinfer"
    with pytest.raises(ConfigError, match=r"--prefill-attention-backend flashinfer: the package flashinfer is not installed"):
        settle(hardware=GPU_BOX, **{asked: "flashinfer"})
    with pytest.raises(ConfigError, match=r"--prefill-attention-backend triton: the device is cpu; use auto or torch_native"):
        settle(**{asked: "triton"})


def test_attention_is_triton_on_a_gpu_and_torch_only_where_that_was_said_or_must_be() -> None:
    told = replace(GPU_BOX, gpu_kernels_missing="MOESAIC_GPU_KERNELS=torch")
    assert row(settle(), "attention backend")["chosen"] == "own CPU kernels"
    for asked in ("auto", "triton"):
        assert row(settle(hardware=GPU_BOX, attention_backend=asked), "attention backend")["chosen"] == "triton, our kernels"
    assert row(settle(hardware=told, attention_backend="torch"), "attention backend")["automatic_downgrade"] is False
    bare = settle(hardware=BARE_GPU_BOX)
    assert row(bare, "attention backend")["automatic_downgrade"] is True
    assert row(bare, "prefill attention")["chosen"] == "torch, our reference"
    for machine, asked in ((LAPTOP, "triton"), (BARE_GPU_BOX, "triton"), (GPU_BOX, "torch")):
        with pytest.raises(ConfigError, match=f"--attention-backend {asked}: "):
            settle(hardware=machine, attention_backend=asked)


def test_the_kv_cache_may_be_fp8() -> None:
    assert settle().config.kv_dtype == "float32"
    assert settle(kv_cache_dtype="fp8_e4m3").config.kv_dtype == "float8_e4m3fn"
    assert "a CPU has no FP8" in row(settle(kv_cache_dtype="fp8_e4m3"), "KV cache")["chosen"]
    assert settle(hardware=GPU_BOX, kv_cache_dtype="bf16").config.kv_dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype bf16: the model computes in float32; use auto or fp8_e4m3"):
        settle(kv_cache_dtype="bf16")


def test_the_report_is_json_and_names_every_capability_once() -> None:
    rows = report_rows(settle(**DP2).choices)

    assert json.loads(json.dumps(rows)) == rows
    names = [row["capability"] for row in rows]
    assert len(names) == len(set(names))
    assert {"attention backend", "dispatch", "expert runner", "quantisation", "CUDA graphs", "prefix cache"} <= set(names)


def test_missing_cpu_kernels_are_a_downgrade_with_their_reason_unless_they_were_switched_off() -> None:
    def row(missing: str | None) -> Choice:
        hardware = Hardware(num_cores=4, cpu_kernels_missing=missing)
        return next(choice for choice in settle(hardware=hardware).choices if choice.capability == "CPU kernels")

    assert (row(None).chosen, row(None).downgrade) == ("compiled C", False)
    lesser = row("no C compiler")
    assert (lesser.chosen, lesser.downgrade, lesser.refused) == ("torch", True, (("compiled C", "no C compiler"),))
    assert not row("MOESAIC_CPU_KERNELS=torch").downgrade


@pytest.mark.parametrize(("role", "mode"), [("prefill", "normal"), ("decode", "low_latency")])
@pytest.mark.parametrize("flags", [{}, DP2], ids=["none", "torch"])
def test_a_role_decides_the_dispatch_mode(role: str, mode: str, flags: dict[str, Any]) -> None:
    settled = settle(**flags, disaggregation_mode=role)

    assert (settled.config.dispatch_mode, settled.config.transfer_backend) == (mode, "tcp")
    assert row(settled, "role")["chosen"].startswith(role)


def test_a_decode_instance_says_what_becomes_of_retracted_kv() -> None:
    kept = row(settle(disaggregation_mode="decode", disaggregation_host_kv_gb=1.5), "KV of retracted requests")
    unasked = row(settle(disaggregation_mode="decode"), "KV of retracted requests")
    again = row(settle(disaggregation_mode="decode", disaggregation_host_kv_gb=0.0), "KV of retracted requests")

    assert "host memory, up to 1.5 GB per rank, where" in kept["chosen"]
    assert "host memory, up to 4 GB per rank, or half of what this machine has left, where" in unasked["chosen"]
    assert again["chosen"] == "computed again"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"disaggregation_mode": "prefill", "deepep_mode": "low_latency"}, "prefill instances always take normal"),
        ({"disaggregation_mode": "prefill", "num_reserved_decode_tokens": 9}, "it is a setting of decode instances"),
        ({"disaggregation_host_kv_gb": 1.0}, "it is a setting of decode instances"),
        ({"disaggregation_checksum": True}, "leave --disaggregation-checksum out, or use --disaggregation-mode decode"),
        ({"disaggregation_mode": "decode", "disaggregation_transfer_backend": "mooncake"}, "pip install mooncake"),
    ],
)
def test_flags_that_a_role_rules_out_are_refused(flags: dict[str, Any], words: str) -> None:
    if "mooncake" in words and missing_reason("mooncake") is None:
        pytest.skip("mooncake is installed")
    with pytest.raises(ConfigError, match=words):
        settle(**flags)
