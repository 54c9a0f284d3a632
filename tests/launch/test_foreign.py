"""Command lines written for SGLang and vLLM: every flag is taken with its meaning or refused by name, none is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepseek_v3 import DEEPSEEK_V3

from moesaic.launch.args import parse_serve
from moesaic.launch.config import ServerConfig
from moesaic.launch.errors import ConfigError
from moesaic.launch.flags import FLAG_GROUPS, LATER_FLAGS
from moesaic.launch.foreign import environment_notes, explain, flag_notes
from moesaic.launch.foreign_flags import INSTEAD, SATISFIED, TRANSLATED, VALUE_HINTS
from moesaic.launch.hardware import Hardware
from moesaic.launch.models.config import parse_model_config
from moesaic.launch.resolution import resolve
from moesaic.launch.startup import model_shape

# All flags of SGLang 0.5.23, aliases included.
SGLANG_FLAGS = (Path(__file__).parent / "sglang_flags.txt").read_text().split()
OURS = {name for flags in FLAG_GROUPS.values() for flag in flags for name in flag.names} | {flag.name for flag in LATER_FLAGS}

# SGLang's published commands for DeepSeek-V3 on 12 nodes of 8 GPUs (sgl-project/sglang issue 6017, May 2025), 4 and 9 nodes.
COMMON_6017 = (
    "--model-path DeepSeek-V3-0324 --disaggregation-ib-device mlx5_1 --dist-init-addr 10.0.0.1:5757 --node-rank 0 "
    "--enable-dp-attention --decode-log-interval 1 --enable-deepep-moe --page-size 1 --host 0.0.0.0 --trust-remote-code "
    "--moe-dense-tp-size 1 --enable-dp-lm-head --disable-radix-cache --watchdog-timeout 1000000 --enable-two-batch-overlap "
    "--ep-num-redundant-experts 32 --init-expert-location in2000.json "
)
PREFILL_6017 = COMMON_6017 + (
    "--disaggregation-mode prefill --nnodes 4 --tp-size 32 --dp-size 32 --deepep-mode normal --mem-fraction-static 0.85 "
    "--chunked-prefill-size 524288 --max-running-requests 8192 --max-total-tokens 131072 --context-length 8192 "
    "--ep-dispatch-algorithm dynamic --eplb-algorithm deepseek --deepep-config deepep.json"
)
DECODE_6017 = COMMON_6017 + (
    "--disaggregation-mode decode --nnodes 9 --tp-size 72 --dp-size 72 --deepep-mode low_latency --mem-fraction-static 0.835 "
    "--max-running-requests 18432 --context-length 4500 --cuda-graph-bs 256 --num-reserved-decode-tokens 102"
)
# SGLang's LeaderWorkerSet example for DeepSeek-R1 (docs/references/multi_node_deployment/lws_pd).
PREFILL_LWS = (
    "--port 30000 --host 0.0.0.0 --model-path /work/models --disaggregation-ib-device mlx5_bond_0,mlx5_bond_1 "
    "--chunked-prefill-size 524288 --max-prefill-tokens 32768 --page-size 64 --ep-dispatch-algorithm dynamic "
    "--eplb-algorithm deepseek --enable-dp-lm-head --enable-dp-attention --dp-size 16 --disable-radix-cache "
    "--moe-a2a-backend deepep --disaggregation-mode prefill --mem-fraction-static 0.7 --context-length 32768 --tp 16 "
    "--dist-init-addr leader:20102 --nnodes 2 --node-rank 1 --trust-remote-code --ep-num-redundant-experts 32 "
    "--moe-dense-tp-size 1 --max-running-requests 1024"
)


def refusal(command: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_serve(["--model-path", "m", *command.split()])
    return str(caught.value).splitlines()


@pytest.mark.parametrize("command", [PREFILL_6017, DECODE_6017, PREFILL_LWS])
def test_the_published_commands_mean_the_same_here(command: str) -> None:
    config = parse_serve(command.split())

    assert (config.moe_a2a_backend, config.moe_dense_tp_size, config.ep_num_redundant_experts) == ("deepep", 1, 32)
    assert config.tp_size == config.dp_size and config.enable_dp_attention and config.enable_dp_lm_head
    assert flag_notes(command.split()) == ["--trust-remote-code: no code of a checkpoint is ever run"]


def test_the_published_decode_flags_value_by_value() -> None:
    config = parse_serve(DECODE_6017.split())

    assert (config.nnodes, config.tp_size, config.disaggregation_mode, config.deepep_mode) == (9, 72, "decode", "low_latency")
    assert (config.cuda_graph_bs, config.num_reserved_decode_tokens, config.decode_log_interval) == ((256,), 102, 1)
    assert (config.max_running_requests, config.mem_fraction_static, config.watchdog_timeout) == (18432, 0.835, 1000000)


def test_the_published_decode_instance_fits_deepseek_v3_with_its_batch_of_256_per_gpu() -> None:
    config = parse_serve(f"{DECODE_6017} --deepep-max-dispatch-tokens-per-rank 256".split())
    shape = model_shape(parse_model_config(DEEPSEEK_V3))

    resolved = resolve(config, shape, Hardware(num_cores=64, num_cuda_devices=8, deepep_missing=None)).config

    assert (resolved.max_running_requests_per_dp, resolved.cuda_graph_rows) == (256, (256,))


def test_every_flag_of_sglang_is_taken_or_refused_by_name_with_a_reason() -> None:
    taken = OURS | SATISFIED.keys() | TRANSLATED.keys()
    lost = [flag for flag in SGLANG_FLAGS if flag not in taken and explain(flag) is None]

    assert len(SGLANG_FLAGS) > 500
    assert lost == []
    assert refusal("--lora-paths a=b") == ["--lora-paths: LoRA adapters are not built; leave it out"]


@pytest.mark.parametrize(("typed", "meant"), [("--deepep-mod", "--deepep-mode"), ("--log-leve", "--log-level")])
def test_a_misspelt_flag_is_no_foreign_one(typed: str, meant: str) -> None:
    assert refusal(f"{typed} auto") == [f"unknown flag {typed}: did you mean {meant}?"]


def test_no_flag_of_ours_is_explained_away_and_every_flag_a_reason_names_is_ours() -> None:
    assert not (INSTEAD.keys() | SATISFIED.keys() | TRANSLATED.keys()) & OURS
    named = [word.strip("().,;") for reason in (*INSTEAD.values(), *VALUE_HINTS.values()) for word in reason.split()]
    assert {word for word in named if word.startswith("--")} <= OURS


@pytest.mark.parametrize(("flag", "reason"), [("--max-model-len 4096", "--context-length"), ("--enable-dbo", "two-batch")])
def test_vllms_flags_get_our_names(flag: str, reason: str) -> None:
    (line,) = refusal(flag)

    assert line.startswith(flag.split(maxsplit=1)[0]) and reason in line


def test_all_that_is_wrong_comes_at_once() -> None:
    lines = refusal("--attention-backend flashmla --dtype half --port x --hicache-ratio 2 --pp-size 2 --tp_size 4 -tp 4")

    assert len(lines) == 8
    assert "unknown flag --tp_size: did you mean --tp-size?" in lines and "unknown flag -tp: did you mean --tp?" in lines
    assert any(
        line.startswith("--attention-backend flashmla: choose from auto, triton, torch (auto is our own MLA") for line in lines
    )


def test_sglangs_newer_spellings() -> None:
    config = parse_serve(
        ["--model", "m", "--tp", "8", "--attn-dp-size=4", "--nccl-init-addr", "a:1", "--cuda-graph-max-bs-decode", "8"]
    )

    assert config == ServerConfig(
        model_path="m", tp_size=8, dp_size=4, enable_dp_attention=True, dist_init_addr="a:1", cuda_graph_max_bs=8
    )
    assert "leave it or --dp-size out" in refusal("--attn-dp-size 4 --dp-size 2")[0]
    assert "leave it or --moe-a2a-backend out" in refusal("--enable-deepep-moe --moe-a2a-backend torch")[0]


def test_variables_that_nobody_reads_are_named() -> None:
    environ = {
        "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256",
        "SGLANG_TORCH_PROFILER_DIR": "/tmp",
        "SGL_JIT_DEEPGEMM_PRECOMPILE": "0",
        "NCCL_IB_HCA": "mlx5_1",
    }

    assert environment_notes(environ) == [
        "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=256 is not read: here it is --deepep-max-dispatch-tokens-per-rank",
        "not read: SGL_JIT_DEEPGEMM_PRECOMPILE",
    ]
