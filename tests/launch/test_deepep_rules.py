"""DeepEP's flags: what is refused at start and why, and what the ranks are told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.launch.config import ServerConfig
from moesaic.launch.deepep_rules import deepep_memory, read_tuning
from moesaic.launch.errors import ConfigError
from moesaic.launch.hardware import Hardware, _missing_deepep
from moesaic.launch.models.config import load_model_config
from moesaic.launch.report import report_rows
from moesaic.launch.resolution import Resolution, resolve
from moesaic.launch.topology import ModelShape

V3 = ModelShape(
    num_heads=128,
    num_experts=256,
    moe_intermediate_size=2048,
    intermediate_size=18432,
    vocab_size=129280,
    context_length=4096,
    hidden_size=7168,
    topk=8,
    fp8_checkpoint=True,
)
GPU_BOX = Hardware(num_cores=64, num_cuda_devices=8)
TUNING = {
    "normal_dispatch": {"num_sms": 24, "num_max_nvl_chunked_send_tokens": 16, "num_max_nvl_chunked_recv_tokens": 512},
    "normal_combine": {"num_sms": 24, "num_max_nvl_chunked_send_tokens": 8},
}


def settle(hardware: Hardware = GPU_BOX, **flags: Any) -> Resolution:
    layout = {"tp_size": 8, "dp_size": 8, "enable_dp_attention": True, "moe_a2a_backend": "deepep"}
    return resolve(ServerConfig(model_path="m", **layout | flags), V3, hardware)


def _row(resolution: Resolution) -> str:
    return next(row["chosen"] for row in report_rows(resolution.choices) if row["capability"] == "dispatch")


def test_the_report_shows_mode_sizes_and_queues() -> None:
    row = _row(settle(quantization="fp8"))
    assert "deepep, mode auto: normal if any rank prefills, else low_latency, FP8 to the experts, bf16 back" in row
    assert "up to 128 tokens per rank in low-latency steps" in row
    assert "NVLink buffer" in row and "RDMA buffer" in row and "32 QPs per rank of depth 1024 (NVSHMEM_QP_DEPTH)" in row
    assert "deepep_v2, mode normal, bf16, buffer" in _row(
        settle(moe_a2a_backend="deepep_v2", deepep_mode="normal", quantization="none")
    )


def test_the_ranks_are_told_modes_tokens_and_tuning() -> None:
    flags = {"chunked_prefill_size": 8 * 1000, "max_running_requests": 8 * 24, "deepep_max_dispatch_tokens_per_rank": 256}
    settings = settle(deepep_config=json.dumps(TUNING), quantization="fp8", **flags).config.deepep
    assert (settings.mode, settings.max_tokens_per_rank, settings.max_normal_tokens_per_rank, settings.fp8) == (
        "auto",
        256,
        1023,  # of 24 that run one prefills
        True,
    )
    assert settings.dispatch is not None and settings.dispatch.num_max_nvl_chunked_recv_tokens == 512
    assert settings.combine is not None and settings.combine.num_max_nvl_chunked_send_tokens == 8
    shared = settle(dp_size=4, chunked_prefill_size=4 * 1000, max_running_requests=4 * 24).config.deepep
    assert shared.max_normal_tokens_per_rank == 512, "the ranks of an attention-TP group share their tokens"


def test_instances_with_a_role_run_one_mode() -> None:
    decode = {
        "tp_size": 72,
        "dp_size": 72,
        "nnodes": 9,
        "dist_init_addr": "h:1",
        "ep_num_redundant_experts": 32,
        "enable_dp_lm_head": True,
    }
    assert settle(**decode, disaggregation_mode="decode").config.deepep.mode == "low_latency"
    assert settle(disaggregation_mode="prefill").config.deepep.mode == "normal"
    with pytest.raises(ConfigError, match="72 ranks in normal mode"):
        settle(**decode)


@pytest.mark.parametrize(
    ("flags", "hardware", "wanted"),
    [
        ({}, Hardware(num_cores=8), "the device is cpu (torch sees no CUDA device); use --moe-a2a-backend torch"),
        ({"device": "cpu"}, GPU_BOX, "the device is cpu (--device cpu)"),
        (
            {"moe_a2a_backend": "deepep_v2"},
            Hardware(num_cores=8, num_cuda_devices=8, deepep_missing="deep_ep has no ElasticBuffer"),
            "--moe-a2a-backend deepep_v2: deep_ep has no ElasticBuffer",
        ),
        ({"enable_single_batch_overlap": True}, GPU_BOX, "DeepEP returns it as a whole; --enable-two-batch-overlap"),
        ({"dtype": "float32"}, GPU_BOX, "--dtype float32 with --moe-a2a-backend deepep"),
        ({"moe_a2a_backend": "torch", "deepep_config": "{}"}, GPU_BOX, "--deepep-config with --moe-a2a-backend torch"),
        ({"ep_num_redundant_experts": 3}, GPU_BOX, "259 expert slots are no multiple of 8 ranks"),
        (
            {"deepep_max_dispatch_tokens_per_rank": 2048},
            GPU_BOX,
            "2048 tokens per rank in low-latency mode; 128 are usual, 1024 the most",
        ),
    ],
)
def test_what_deepep_cannot_do_is_refused_at_start(flags: dict[str, Any], hardware: Hardware, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settle(hardware, **flags)
    assert wanted in str(caught.value)


def test_a_machine_without_deepep_says_so_and_how_to_get_it() -> None:
    """Asked in a process of its own, as a launcher with GPUs does."""
    reason = _missing_deepep("deepep")
    assert reason is not None and "deep_ep can't be imported" in reason and "install.sh" in reason
    assert _missing_deepep("torch") is None


def test_tuning_is_json_or_a_file_of_it(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(TUNING))
    assert read_tuning(str(path)) == read_tuning(json.dumps(TUNING))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("no-such-file", "--deepep-config no-such-file: No such file"),
        ("{", "not valid JSON"),
        ('{"normal_dispatch": {}}', "wanted an object with normal_dispatch and normal_combine"),
        (json.dumps(TUNING | {"normal_combine": {"num_sms": 20}}), "num_sms 24 and 20"),
        (json.dumps(TUNING | {"normal_combine": {"sms": 20}}), "normal_combine has sms; known are"),
        (json.dumps(TUNING | {"normal_combine": {"num_sms": "24"}}), "an object of whole numbers"),
        (json.dumps(TUNING | {"normal_combine": {"num_sms": 23}}), "normal_combine: num_sms 23: an even number above 0"),
    ],
)
def test_a_tuning_that_says_nothing_legal_is_refused_by_place(text: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_tuning(text)
    assert wanted in str(caught.value)


def test_the_memory_plan_counts_the_buffers() -> None:
    from moesaic.launch.demo import CHECKPOINT_DIR

    model = load_model_config(CHECKPOINT_DIR)
    resolution = settle()
    (item,) = deepep_memory(model, 256, resolution.config, resolution.topology)
    assert item.num_bytes > 2**20 and "NVLink buffer" in item.basis
    fewer = replace(resolution.config, max_dispatch_tokens_per_rank=64)
    assert deepep_memory(model, 256, fewer, resolution.topology)[0].num_bytes < item.num_bytes, "advice tries smaller sizes"
    torch_backend = settle(moe_a2a_backend="torch")
    assert deepep_memory(model, 256, torch_backend.config, torch_backend.topology) == ()
