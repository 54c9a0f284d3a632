"""The command line's flags as data: what belongs to `ServerConfig`, and what belongs to capabilities that are not built
yet.

Knows no parser. A flag's default is its `ServerConfig` field's default, written there once. SGLang's names and aliases
are kept.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from moesaic.kernels.grouped_backends import NAMES

NumberT = TypeVar("NumberT", int, float)


def positive_int(text: str) -> int:
    """An integer >= 1."""
    return _checked(text, int, lambda value: value >= 1, "an integer of 1 or more")


def rank_number(text: str) -> int:
    """An integer >= 0."""
    return _checked(text, int, lambda value: value >= 0, "an integer of 0 or more")


def port_number(text: str) -> int:
    """A TCP port; 0 is refused, because nobody would know where the server listens."""
    return _checked(text, int, lambda value: 1 <= value <= 65535, "a port in 1..65535")


def chunk_size(text: str) -> int:
    """A number of tokens, or -1 for prompts in one piece."""
    return _checked(text, int, lambda value: value == -1 or value >= 1, "a number of tokens, or -1 for no chunking")


def count_or_any(text: str) -> int:
    """A number of 1 or more, or -1 for no limit."""
    return _checked(text, int, lambda value: value == -1 or value >= 1, "an integer of 1 or more, or -1 for no limit")


def fraction(text: str) -> float:
    """A number in (0, 1]."""
    return _checked(text, float, lambda value: 0 < value <= 1, "a fraction above 0 and up to 1")


def gigabytes(text: str) -> float:
    """A number >= 0, finite."""
    return _checked(text, float, lambda value: 0 <= value < float("inf"), "a number of GB, 0 or more")


def smaller_share(text: str) -> float:
    """A number in [0, 0.5]: what the smaller of two sides may have of the whole."""
    return _checked(text, float, lambda value: 0 <= value <= 0.5, "a share in 0..0.5")


def address(text: str) -> str:
    """HOST:PORT. The ports after it are used as well (see `launch/endpoints.py`)."""
    host, colon, port = text.rpartition(":")
    if not (colon and host):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    port_number(port)
    return text


def _checked(text: str, kind: type[NumberT], legal: Callable[[NumberT], bool], wanted: str) -> NumberT:
    value: NumberT | None = None
    with contextlib.suppress(ValueError):
        value = kind(text)
    if value is None or not legal(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag.

    The first of `names` gives the ServerConfig field. `kind` None means a switch that turns the field on. `several`: takes one
    value or more, a tuple in the ServerConfig.
    """

    names: tuple[str, ...]
    help: str
    kind: Callable[[str], Any] | None = str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    several: bool = False

    @property
    def field(self) -> str:
        return self.names[0].removeprefix("--").replace("-", "_")


def _flag(
    name: str, help: str, kind: Callable[[str], Any] = str, metavar: str | None = None, aliases: tuple[str, ...] = ()
) -> Flag:
    return Flag(names=(name, *aliases), help=help, kind=kind, metavar=metavar or ("N" if kind is not str else None))


def _choice(name: str, help: str, *choices: str) -> Flag:
    return Flag(names=(name,), help=help, choices=choices)


def _switch(name: str, help: str, *aliases: str) -> Flag:
    return Flag(names=(name, *aliases), help=help, kind=None)


FLAG_GROUPS: dict[str, tuple[Flag, ...]] = {
    "model": (
        _flag("--model-path", "folder with config.json and *.safetensors, or `demo`", metavar="DIR", aliases=("--model",)),
        _flag("--tokenizer-path", "folder with tokenizer.json (the model's)", metavar="DIR"),
        _flag("--served-model-name", "the name in /v1/models (the model path)", metavar="NAME"),
        _choice("--load-format", "dummy: random weights of the right shapes", "auto", "safetensors", "dummy"),
        _choice(
            "--dtype",
            "what weights and activations compute in; auto: float32 on CPU, bfloat16 on CUDA",
            "auto",
            "float32",
            "bfloat16",
        ),
        _choice(
            "--quantization",
            "fp8: W8A8 of an FP8 checkpoint; otherwise its weights are dequantised at load",
            "auto",
            "none",
            "fp8",
        ),
        _flag("--context-length", "longest prompt + output in tokens (the model's)", positive_int),
    ),
    "http": (
        _flag("--host", "address to listen on"),
        _flag("--port", "port to listen on; a node other than 0 serves its health there", port_number),
        _flag("--api-key", "demand `Authorization: Bearer KEY`", metavar="KEY"),
        _switch("--enable-metrics", "as in SGLang; /metrics is served without it too"),
        _choice("--log-level", "how much to log", "debug", "info", "warning", "error"),
        _choice(
            "--log-level-http",
            "how much uvicorn logs; info: every HTTP request (debug with --log-level debug, else warning)",
            "debug",
            "info",
            "warning",
            "error",
        ),
        _switch("--log-requests", "log every request when it arrives and when it ends"),
        Flag(
            names=("--log-requests-level",),
            help="0: names, sizes and times; 1: sampling parameters too; 2: the beginning of prompt and answer too; 3: all of them",
            kind=rank_number,
            choices=("0", "1", "2", "3"),
        ),
        _switch("--skip-server-warmup", "don't run one token before the server says it is ready"),
        _flag("--max-queued-requests", "requests waiting beyond this get 429 (16384)", positive_int),
    ),
    "parallel layout": (
        _flag(
            "--tp-size",
            "all ranks of the server, on all nodes",
            positive_int,
            aliases=("--tp", "--tensor-parallel-size"),
        ),
        _flag("--dp-size", "DP ranks: attention TP is tp / dp", positive_int, aliases=("--dp", "--data-parallel-size")),
        _flag(
            "--ep-size",
            "expert-parallel ranks; tp with an all-to-all backend",
            positive_int,
            aliases=("--ep", "--expert-parallel-size", "--moe-ep-size"),
        ),
        _switch("--enable-dp-attention", "attention in dp groups, each with its own scheduler and cache"),
        _switch("--enable-dp-lm-head", "a whole or attention-TP head per DP rank"),
        _flag("--moe-dense-tp-size", "ranks that share a dense layer: 1, or attention TP (default)", positive_int),
        _flag("--nnodes", "machines that form the server", positive_int),
        _flag("--node-rank", "which of them this is; 0 serves HTTP", rank_number),
        _flag(
            "--dist-init-addr",
            "where the nodes meet, on node 0; the same on all",
            address,
            metavar="HOST:PORT",
            aliases=("--nccl-init-addr",),
        ),
        _flag(
            "--dist-timeout",
            "deadline of the nodes' meeting and of collectives, in seconds",
            positive_int,
            metavar="SECONDS",
        ),
        _choice(
            "--load-balance-method",
            "how DP ranks are chosen; auto: total_tokens",
            "auto",
            "round_robin",
            "total_tokens",
            "total_requests",
        ),
    ),
    "experts": (
        _choice(
            "--moe-a2a-backend",
            "how tokens reach their experts; none: all-gather and all-reduce; symm: over memory that GPUs of a node share",
            "none",
            "torch",
            "symm",
            "deepep",
            "deepep_v2",
        ),
        _choice(
            "--moe-runner-backend",
            "what computes the experts; auto: torch on CPU, on CUDA a table's choice by shape among those that are there",
            "auto",
            *NAMES,
        ),
        _choice(
            "--deepep-mode",
            "dispatch mode; auto: normal if any rank prefills, else low_latency",
            "auto",
            "normal",
            "low_latency",
        ),
        _flag(
            "--deepep-max-dispatch-tokens-per-rank",
            "most tokens a rank may bring into a low-latency step",
            positive_int,
        ),
        _flag(
            "--deepep-config",
            "tuning of DeepEP's normal kernels: JSON, or a file of it, with normal_dispatch and normal_combine",
            metavar="JSON",
        ),
    ),
    "placement of experts": (
        _switch("--enable-eplb", "move expert weights while serving, so that their load stays balanced"),
        _flag("--ep-num-redundant-experts", "slots for further replicas, in each layer", rank_number),
        _choice(
            "--ep-dispatch-algorithm",
            "which replica a token goes to (static)",
            "static",
            "dynamic",
            "probability",
            "balanced",
            "activated",
        ),
        _flag(
            "--init-expert-location",
            "trivial; or a placement or a load, as a file (.npz, .pt, .json) or inline JSON",
            metavar="WHERE",
        ),
        _choice("--eplb-algorithm", "how placements are found", "auto", "deepseek", "deepseek_hierarchical"),
        _flag("--eplb-rebalance-num-iterations", "forwards between two rebalances", positive_int),
        _flag("--eplb-rebalance-layers-per-chunk", "layers moved before a step's pause (no pause)", positive_int),
        _flag(
            "--eplb-min-rebalancing-utilization-threshold",
            "no rebalance while balancedness is above it",
            fraction,
            metavar="F",
        ),
        _choice(
            "--expert-distribution-recorder-mode",
            "what a recording keeps: windows of steps, single steps, or single tokens",
            "stat",
            "per_pass",
            "per_token",
        ),
        _flag("--expert-distribution-recorder-buffer-size", "most windows that a recording keeps; -1: any number", count_or_any),
        _choice("--expert-balancedness-report-mode", "log balancedness without moving experts", "off", "server_log"),
    ),
    "overlap of computation and communication": (
        _switch("--enable-two-batch-overlap", "run steps as two micro-batches in turns, from the size on where that is faster"),
        _switch("--enable-single-batch-overlap", "compute shared expert and down projection while dispatch and combine travel"),
        _flag(
            "--tbo-token-distribution-threshold",
            "cut inside a sequence when the smaller micro-batch would have less of the tokens; 0: never inside",
            smaller_share,
            metavar="F",
        ),
        _flag(
            "--tbo-profile",
            "file that says from which size on splitting is faster; written if it does not exist (measured at every start)",
            metavar="FILE",
        ),
    ),
    "prefill/decode disaggregation": (
        _choice(
            "--disaggregation-mode",
            "role of this server; prefill and decode servers work behind a router (`moesaic router`)",
            "null",
            "prefill",
            "decode",
        ),
        _choice(
            "--disaggregation-transfer-backend",
            "what moves KV pages; auto: tcp on CPU, nixl or mooncake on CUDA",
            "auto",
            "tcp",
            "nixl",
            "mooncake",
        ),
        _flag(
            "--disaggregation-bootstrap-port",
            "where a prefill server's ranks are found; on decode: where they are if a request doesn't say",
            port_number,
        ),
        _flag("--disaggregation-ib-device", "InfiniBand devices for mooncake", metavar="NAMES"),
        _flag(
            "--disaggregation-timeout",
            "deadline of a request that waits for the other side, in seconds",
            positive_int,
            metavar="SECONDS",
        ),
        _switch("--disaggregation-checksum", "decode checks every page that it has fetched", "--disaggregation-enable-kv-checksum"),
        _flag(
            "--num-reserved-decode-tokens",
            "most KV tokens that decode keeps free for a running request's growth; fewer where answers are shorter",
            rank_number,
        ),
        _flag(
            "--disaggregation-host-kv-gb",
            "host memory of each decode rank for the KV of retracted requests, in GB; 0: they are computed again",
            gigabytes,
            metavar="GB",
        ),
    ),
    "memory and scheduling": (
        _flag(
            "--mem-fraction-static",
            "share of memory for weights and KV cache (0.5 CPU, 0.85 CUDA)",
            fraction,
            metavar="F",
        ),
        _flag("--max-running-requests", "requests decoding at once, on the whole server (256 per DP rank)", positive_int),
        _flag("--max-total-tokens", "KV cache tokens per DP rank (what the memory fraction leaves)", positive_int),
        _flag("--chunked-prefill-size", "prompt tokens per step, on the whole server; -1: whole prompts", chunk_size),
        _flag("--max-prefill-tokens", "prompt tokens that one DP rank admits in one step", positive_int),
        _flag("--page-size", "KV cache tokens per page (16 CPU, 64 CUDA)", positive_int),
        _choice(
            "--kv-cache-dtype", "auto: the model's; fp8_e4m3: half of bfloat16's memory", "auto", "bf16", "bfloat16", "fp8_e4m3"
        ),
        _choice("--schedule-policy", "order of admission; lpm: longest cached prefix first", "fcfs", "lpm"),
        _switch("--disable-radix-cache", "no prefix cache"),
        _choice("--radix-eviction-policy", "what leaves the prefix cache first", "lru"),
        _switch("--disable-overlap-schedule", "schedule a step only when the step before has been handled"),
        _switch("--disable-cuda-graph", "decode steps run operation by operation", "--disable-decode-cuda-graph"),
        Flag(
            names=("--cuda-graph-bs", "--cuda-graph-bs-decode"),
            help="requests per DP rank that CUDA graphs are captured for (1, 2, 4, 8, 16, ...)",
            kind=positive_int,
            metavar="N",
            several=True,
        ),
        _flag(
            "--cuda-graph-max-bs",
            "the most requests per DP rank that they are captured for (all that may run)",
            positive_int,
            aliases=("--cuda-graph-max-bs-decode",),
        ),
    ),
    "device and process": (
        _choice("--device", "auto: cuda if every rank gets one", "auto", "cpu", "cuda"),
        _choice("--attention-backend", "what computes attention", "auto", "torch"),
        _choice(
            "--prefill-attention-backend",
            "what computes a prompt's attention; auto: flashinfer where it is installed, else our kernels",
            *("auto", "triton", "torch_native", "flashinfer"),
        ),
        _flag("--num-threads", "CPU threads per rank (cores / ranks of this node)", positive_int),
        _flag("--random-seed", "seed of the seeds that requests without one get (default: chance)", rank_number),
        _flag(
            "--watchdog-timeout",
            "a rank in one operation for longer is unhealthy, in seconds",
            positive_int,
            metavar="SECONDS",
        ),
        _flag("--decode-log-interval", "steps of a DP rank between two lines that say what it does", positive_int),
        _switch("--strict", "refuse to start when any capability would be downgraded automatically"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class LaterFlag:
    """A flag of a capability that is not built yet.

    `off` are the values that ask for nothing; None: a switch, off by absence.
    """

    name: str
    capability: str
    off: tuple[str, ...] | None


def _later(capability: str, **flags: tuple[str, ...] | None) -> tuple[LaterFlag, ...]:
    return tuple(LaterFlag(name="--" + name.replace("_", "-"), capability=capability, off=off) for name, off in flags.items())


# SGLang's defaults count as off, so that a script that spells them out keeps working. The first ones are listed in --help.
LATER_FLAGS: tuple[LaterFlag, ...] = (
    *_later("pipeline parallelism", pp_size=("1",), pipeline_parallel_size=("1",)),
    *_later("hierarchical cache", enable_hierarchical_cache=None),
    *_later("speculative decoding", speculative_algorithm=(), speculative_num_steps=("0",)),
    *_later("deterministic logits", deterministic=None),
    *_later("context parallelism", attn_cp_size=("1",), dcp_size=("1",), moe_dp_size=("1",), dwdp_size=("1",)),
    *_later("another tokenizer", tokenizer_mode=("auto",), tokenizer_backend=("huggingface",)),
    *_later("more than one tokenizer process", tokenizer_worker_num=("1",), detokenizer_worker_num=("1",)),
    *_later("streaming less often than every step", stream_interval=("1",)),
    *_later("several decode steps without scheduling", num_continuous_decode_steps=("1",), scheduler_recv_interval=("1",)),
    *_later("another first GPU", base_gpu_id=("0",), gpu_id_step=("1",)),
    *_later("another way to load weights", model_loader_extra_config=("{}",), json_model_override_args=("{}",)),
    *_later("another name of the weights", weight_version=("default",)),
    *_later("constrained decoding", grammar_backend=("none",)),
    *_later("offloading of weights", cpu_offload_gb=("0",)),
    *_later("a prefill graph", cuda_graph_backend_prefill=("disabled",)),
    *_later("a decode graph of another kind (--disable-cuda-graph: none)", cuda_graph_backend_decode=("full",)),
    *_later("conservative admission", schedule_conservativeness=("1.0", "1")),
    *_later("polling less often", disaggregation_decode_polling_interval=("1",)),
    *_later("elastic EP", elastic_ep_backend=("none",)),
)
