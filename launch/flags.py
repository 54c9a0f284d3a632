"""The command line's flags as data: what belongs to `ServerConfig`, and what belongs to capabilities that are not built
yet.

All flags stand here, in the groups of `--help`. Knows no parser. A flag's default is its `ServerConfig` field's default, written
there once. SGLang's names and aliases are kept.
"""

from __future__ import annotations

from moesaic.kernels.grouped_backends import DENSE_NAMES, NAMES
from moesaic.launch.flag_kinds import (
    Flag,
    LaterFlag,
    address,
    choice,
    chunk_size,
    flag,
    fraction,
    gigabytes,
    later,
    port_number,
    positive_int,
    rank_number,
    smaller_share,
    switch,
)

FLAG_GROUPS: dict[str, tuple[Flag, ...]] = {
    "model": (
        flag("--model-path", "folder with config.json and *.safetensors, or `demo`", metavar="DIR", aliases=("--model",)),
        flag("--tokenizer-path", "folder with tokenizer.json (the model's)", metavar="DIR"),
        flag("--served-model-name", "the name in /v1/models (the model path)", metavar="NAME"),
        choice("--load-format", "dummy: random weights of the right shapes", "auto", "safetensors", "dummy"),
        choice(
            "--dtype",
            "what weights and activations compute in; auto: float32 on CPU, bfloat16 on CUDA",
            "auto",
            "float32",
            "bfloat16",
        ),
        choice(
            "--quantization",
            "fp8: W8A8 of an FP8 checkpoint; none: its weights are dequantised at load; auto: fp8 on CUDA, none on a CPU",
            "auto",
            "none",
            "fp8",
        ),
        flag("--context-length", "longest prompt + output in tokens (the model's)", positive_int),
    ),
    "http": (
        flag("--host", "address to listen on"),
        flag("--port", "port to listen on; a node other than 0 serves its health there", port_number),
        flag("--api-key", "demand `Authorization: Bearer KEY`", metavar="KEY"),
        switch("--enable-metrics", "serve Prometheus metrics at /metrics"),
        choice("--log-level", "how much to log", "debug", "info", "warning", "error"),
        switch("--skip-server-warmup", "don't run one token before the server says it is ready"),
        flag("--max-queued-requests", "requests waiting beyond this get 429 (16384)", positive_int),
    ),
    "parallel layout": (
        flag(
            "--tp-size",
            "all ranks of the server, on all nodes",
            positive_int,
            aliases=("--tp", "--tensor-parallel-size"),
        ),
        flag("--dp-size", "DP ranks: attention TP is tp / dp", positive_int, aliases=("--dp", "--data-parallel-size")),
        flag(
            "--ep-size",
            "expert-parallel ranks; tp with an all-to-all backend",
            positive_int,
            aliases=("--ep", "--expert-parallel-size", "--moe-ep-size"),
        ),
        switch("--enable-dp-attention", "attention in dp groups, each with its own scheduler and cache"),
        switch("--enable-dp-lm-head", "a whole or attention-TP head per DP rank"),
        flag("--moe-dense-tp-size", "ranks that share a dense layer: 1, or attention TP (default)", positive_int),
        flag("--nnodes", "machines that form the server", positive_int),
        flag("--node-rank", "which of them this is; 0 serves HTTP", rank_number),
        flag("--dist-init-addr", "where the nodes meet, on node 0; the same on all", address, metavar="HOST:PORT"),
        flag(
            "--dist-timeout",
            "deadline of the nodes' meeting and of collectives, in seconds",
            positive_int,
            metavar="SECONDS",
        ),
        choice(
            "--load-balance-method",
            "how DP ranks are chosen; auto: total_tokens",
            "auto",
            "round_robin",
            "total_tokens",
            "total_requests",
        ),
    ),
    "experts": (
        choice(
            "--moe-a2a-backend",
            "how tokens reach their experts; none: all-gather and all-reduce; symm: over memory that GPUs of a node share",
            "none",
            "torch",
            "symm",
            "deepep",
            "deepep_v2",
        ),
        choice(
            "--moe-runner-backend",
            "what computes the experts; auto: torch on CPU, on CUDA a table's choice by shape among those that are there",
            "auto",
            *NAMES,
        ),
        choice(
            "--fp8-gemm-backend",
            "what computes all FP8 products but the routed experts'; auto: on CUDA a table's choice among those there",
            "auto",
            *DENSE_NAMES,
        ),
        choice(
            "--deepep-mode",
            "dispatch mode; auto: normal if any rank prefills, else low_latency",
            "auto",
            "normal",
            "low_latency",
        ),
        flag(
            "--deepep-max-dispatch-tokens-per-rank",
            "most tokens a rank may bring into a low-latency step",
            positive_int,
        ),
        flag(
            "--deepep-config",
            "tuning of DeepEP's normal kernels: JSON, or a file of it, with normal_dispatch and normal_combine",
            metavar="JSON",
        ),
    ),
    "placement of experts": (
        switch("--enable-eplb", "move expert weights while serving, so that their load stays balanced"),
        flag("--ep-num-redundant-experts", "slots for further replicas, in each layer", rank_number),
        choice(
            "--ep-dispatch-algorithm",
            "which replica a token goes to (static)",
            "static",
            "dynamic",
            "probability",
            "balanced",
            "activated",
        ),
        flag(
            "--init-expert-location",
            "trivial; or a placement or a load, as a file (.npz, .pt, .json) or inline JSON",
            metavar="WHERE",
        ),
        choice("--eplb-algorithm", "how placements are found", "auto", "deepseek", "deepseek_hierarchical"),
        flag("--eplb-rebalance-num-iterations", "forwards between two rebalances", positive_int),
        flag("--eplb-rebalance-layers-per-chunk", "layers moved before a step's pause (no pause)", positive_int),
        flag(
            "--eplb-min-rebalancing-utilization-threshold",
            "no rebalance while balancedness is above it",
            fraction,
            metavar="F",
        ),
        choice(
            "--expert-distribution-recorder-mode",
            "what a recording keeps: windows of steps, single steps, or single tokens",
            "stat",
            "per_pass",
            "per_token",
        ),
        flag("--expert-distribution-recorder-buffer-size", "most windows that a recording keeps", positive_int),
        choice("--expert-balancedness-report-mode", "log balancedness without moving experts", "off", "server_log"),
    ),
    "overlap of computation and communication": (
        switch("--enable-two-batch-overlap", "run steps as two micro-batches in turns, from the size on where that is faster"),
        switch("--enable-single-batch-overlap", "compute shared expert and down projection while dispatch and combine travel"),
        flag(
            "--tbo-token-distribution-threshold",
            "cut inside a sequence when the smaller micro-batch would have less of the tokens; 0: never inside",
            smaller_share,
            metavar="F",
        ),
        flag(
            "--tbo-profile",
            "file that says from which size on splitting is faster; written if it does not exist (measured at every start)",
            metavar="FILE",
        ),
    ),
    "prefill/decode disaggregation": (
        choice(
            "--disaggregation-mode",
            "role of this server; prefill and decode servers work behind a router (`moesaic router`)",
            "null",
            "prefill",
            "decode",
        ),
        choice(
            "--disaggregation-transfer-backend",
            "what moves KV pages; auto: tcp on CPU, nixl or mooncake on CUDA",
            "auto",
            "tcp",
            "nixl",
            "mooncake",
        ),
        flag(
            "--disaggregation-bootstrap-port",
            "where a prefill server's ranks are found; on decode: where they are if a request doesn't say",
            port_number,
        ),
        flag("--disaggregation-ib-device", "InfiniBand devices for mooncake", metavar="NAMES"),
        flag(
            "--disaggregation-timeout",
            "deadline of a request that waits for the other side, in seconds",
            positive_int,
            metavar="SECONDS",
        ),
        switch("--disaggregation-checksum", "decode checks every page that it has fetched"),
        flag(
            "--num-reserved-decode-tokens",
            "most KV tokens that decode keeps free for a running request's growth; fewer where answers are shorter",
            rank_number,
        ),
        flag(
            "--disaggregation-host-kv-gb",
            "host memory of a decode rank for the KV of retracted requests, in GB (4, or half of what is left); 0: none",
            gigabytes,
            metavar="GB",
        ),
    ),
    "memory and scheduling": (
        flag(
            "--mem-fraction-static",
            "share of memory for weights and KV cache (0.5 CPU, 0.85 CUDA)",
            fraction,
            metavar="F",
        ),
        flag("--max-running-requests", "requests decoding at once, on the whole server (256 per DP rank)", positive_int),
        flag("--max-total-tokens", "KV cache tokens per DP rank (what the memory fraction leaves)", positive_int),
        flag("--chunked-prefill-size", "prompt tokens per step, on the whole server; -1: whole prompts", chunk_size),
        flag("--max-prefill-tokens", "prompt tokens that one DP rank admits in one step", positive_int),
        flag("--page-size", "KV cache tokens per page (16 CPU, 64 CUDA)", positive_int),
        choice(
            "--kv-cache-dtype", "auto: the model's; fp8_e4m3: half of bfloat16's memory", "auto", "bf16", "bfloat16", "fp8_e4m3"
        ),
        choice("--schedule-policy", "order of admission; lpm: longest cached prefix first", "fcfs", "lpm"),
        switch("--disable-radix-cache", "no prefix cache"),
        choice("--radix-eviction-policy", "what leaves the prefix cache first", "lru"),
        switch("--disable-overlap-schedule", "schedule a step only when the step before has been handled"),
        switch("--disable-cuda-graph", "decode steps run operation by operation"),
        Flag(
            names=("--cuda-graph-bs",),
            help="requests per DP rank that CUDA graphs are captured for (1, 2, 4, 8, 16, ...)",
            kind=positive_int,
            metavar="N",
            several=True,
        ),
        flag("--cuda-graph-max-bs", "the most requests per DP rank that they are captured for (all that may run)", positive_int),
    ),
    "device and process": (
        choice("--device", "auto: cuda if every rank gets one", "auto", "cpu", "cuda"),
        choice("--attention-backend", "what computes attention", "auto", "torch"),
        choice(
            "--prefill-attention-backend",
            "what computes a prompt's attention; auto: flashinfer where it is installed, else our kernels",
            *("auto", "triton", "torch_native", "flashinfer"),
        ),
        flag(
            "--ranks-per-gpu",
            "ranks that share a GPU, to try a layout on few GPUs: their messages pass through host memory, slowly (1)",
            positive_int,
        ),
        flag("--num-threads", "CPU threads per rank (cores / ranks of this node)", positive_int),
        flag("--random-seed", "seed of the seeds that requests without one get (default: chance)", rank_number),
        flag(
            "--watchdog-timeout",
            "a rank in one operation for longer is unhealthy, in seconds",
            positive_int,
            metavar="SECONDS",
        ),
        switch("--strict", "refuse to start when any capability would be downgraded automatically"),
    ),
}

# SGLang's defaults count as off, so that a script that spells them out keeps working.
LATER_FLAGS: tuple[LaterFlag, ...] = (
    *later("pipeline parallelism", pp_size=("1",), pipeline_parallel_size=("1",)),
    *later("hierarchical cache", enable_hierarchical_cache=None),
    *later("speculative decoding", speculative_algorithm=(), speculative_num_steps=("0",)),
    *later("deterministic logits", deterministic=None),
)
