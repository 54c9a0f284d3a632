"""What SGLang's and vLLM's command lines hold and ours does not, as data: how a flag is taken, or why not, and the remedy.

SGLang's flags are those of 0.5.23 and of the published commands for DeepSeek before it. Knows no parser; `launch/foreign.py` reads
the tables.
"""

from __future__ import annotations

# SGLang's spellings of what we have: flag -> our flags; {} is its value.
TRANSLATED: dict[str, tuple[str, ...]] = {
    "--enable-deepep-moe": ("--moe-a2a-backend", "deepep"),
    "--attn-dp-size": ("--enable-dp-attention", "--dp-size", "{}"),
    "--attention-data-parallel-size": ("--enable-dp-attention", "--dp-size", "{}"),
}

# Switches that ask for what is so anyway: they are taken, and the server says why nothing had to be done.
SATISFIED: dict[str, str] = {
    "--trust-remote-code": "no code of a checkpoint is ever run",
    "--disable-shared-experts-fusion": "shared experts always compute by themselves",
    "--disable-custom-all-reduce": "there is none",
    "--disable-flashinfer-autotune": "there is none",
    "--disable-outlines-disk-cache": "there is none",
    "--disable-prefill-cuda-graph": "prefill is never captured",
    "--enable-cache-report": "`usage` always says how many tokens were cached",
    "--enable-metrics-for-all-schedulers": "every DP rank always has its own metrics",
    "--enable-mixed-chunk": "chunks of prompts always share their steps with decodes",
    "--weight-loader-disable-mmap": "weights are read, not mapped",
    "--sleep-on-idle": "idle ranks always sleep",
    "--disable-log-requests": "requests are logged only with --log-requests",
    "--no-enable-log-requests": "requests are logged only with --log-requests",
    "--enable-prefix-caching": "the prefix cache is on without --disable-radix-cache",
    "--enable-chunked-prefill": "prompts are chunked without --chunked-prefill-size -1",
    "--async-scheduling": "it is on without --disable-overlap-schedule",
}

# vLLM's names, and SGLang's earlier ones: what to write here.
INSTEAD: dict[str, str] = {
    "--max-model-len": "here it is --context-length",
    "--gpu-memory-utilization": "here it is --mem-fraction-static",
    "--max-num-seqs": "here it is --max-running-requests, counted over the whole server",
    "--max-num-batched-tokens": "here it is --chunked-prefill-size, counted over the whole server",
    "--block-size": "here it is --page-size",
    "--tokenizer": "here it is --tokenizer-path",
    "--seed": "here it is --random-seed",
    "--enforce-eager": "here it is --disable-cuda-graph",
    "--no-enable-prefix-caching": "here it is --disable-radix-cache",
    "--no-async-scheduling": "here it is --disable-overlap-schedule",
    "--enable-log-requests": "here it is --log-requests",
    "--uvicorn-log-level": "here it is --log-level-http",
    "--enable-expert-parallel": "here it is an all-to-all --moe-a2a-backend such as deepep, or --ep-size with none",
    "--enable-ep-moe": "here it is --ep-size with --moe-a2a-backend none, or an all-to-all backend",
    "--all2all-backend": "here it is --moe-a2a-backend",
    "--moe-backend": "here it is --moe-runner-backend",
    "--enable-dbo": "here it is --enable-two-batch-overlap",
    "--dbo-decode-token-threshold": "the threshold is measured at the start; --tbo-profile keeps it",
    "--dbo-prefill-token-threshold": "the threshold is measured at the start; --tbo-profile keeps it",
    "--eplb-config": "here it is --enable-eplb with --ep-num-redundant-experts and --eplb-rebalance-num-iterations",
    "--num-redundant-experts": "here it is --ep-num-redundant-experts",
    "--eplb-step-interval": "here it is --eplb-rebalance-num-iterations",
    "--kv-transfer-config": "here it is --disaggregation-mode with --disaggregation-transfer-backend",
    "--master-addr": "here it is --dist-init-addr HOST:PORT",
    "--master-port": "here it is --dist-init-addr HOST:PORT",
    "--data-parallel-address": "here it is --dist-init-addr HOST:PORT",
    "--data-parallel-rpc-port": "here it is --dist-init-addr HOST:PORT",
    "--headless": "every node is started alike, with its --node-rank; node 0 serves HTTP",
    "--nccl-port": "all ports follow from --dist-init-addr",
    "--config": "the flags go onto the command line",
    "--chat-template": "put it into the folder of --tokenizer-path as chat_template.jinja",
    "--hf-chat-template-name": "put the template into the folder of --tokenizer-path as chat_template.jinja",
    "--skip-tokenizer-init": "leave it out: from a --tokenizer-path without tokenizer.json, token ids alone are served",
    "--download-dir": "nothing is downloaded: --model-path names a folder that is there",
    "--revision": "nothing is downloaded: --model-path names a folder that is there",
    "--preferred-sampling-params": "defaults come from the model's generation_config.json",
    "--admin-api-key": "--api-key guards every endpoint but health and metrics",
    "--disable-mla": "MLA is always used; leave it out",
    "--enable-flashinfer-mla": "attention is chosen by --prefill-attention-backend; leave it out",
    "--enable-flashmla": "attention is chosen by --prefill-attention-backend; leave it out",
    "--disable-chunked-prefix-cache": "a cached prefix is always attended to in chunks; leave it out",
    "--allow-auto-truncate": "a prompt that is too long gets status 400, never cut; leave it out",
    "--incremental-streaming-output": "/generate streams the whole text so far, /v1/completions what is new; leave it out",
    "--stream-output": "/generate streams the whole text so far, /v1/completions what is new; leave it out",
    "--enable-priority-scheduling": "priorities order the queue without it, and running requests are never preempted; leave it out",
    "--enable-deterministic-inference": "deterministic logits are not built yet; leave it out",
    "--enable-p2p-check": "NCCL and NVSHMEM check for themselves; leave it out",
    "--dllm-algorithm": "diffusion language models are not served",
}

_SPECULATION = "speculative decoding is not built yet; leave it out"
_LORA = "LoRA adapters are not built; leave it out"
_CACHES = "caches beside the prefix cache on the GPU are not built; leave it out"
_TEXT = "only text goes in and out; leave it out"
_OTHER_MODELS = "it belongs to models that are not served here (DeepSeek-V3, R1 and Kimi-K2 are); leave it out"
_WEIGHTS = "weights are read from the *.safetensors files of --model-path, by every rank its own part; leave it out"
_AS_STORED = "a checkpoint is served as it is stored (fp32, bf16, FP8 in blocks of 128); leave it out"
_OFFLOAD = "weights stay in the memory of their device; leave it out"
_ELASTIC = "a server has the ranks that it was started with; leave it out"
_PARALLEL = "this kind of parallelism is not built (--tp-size, --dp-size and --ep-size are); leave it out"
_TRANSPORT = "the server speaks HTTP/1.1; a proxy in front can do TLS, HTTP/2 and other protocols"
_PLAIN = "tool calls and reasoning are not taken apart, answers are plain text; leave it out"
_GRAMMAR = "constrained decoding is not built; leave it out"
_KERNELS = (
    "kernels and collectives follow from --moe-runner-backend, --prefill-attention-backend and --moe-a2a-backend; leave it out"
)
_GRAPHS = "graphs are captured for decode steps alone, as --cuda-graph-bs and --cuda-graph-max-bs say; leave it out"
_SCHEDULING = "scheduling is set by --schedule-policy, --chunked-prefill-size and --max-running-requests alone; leave it out"
_WATCHING = "there are /metrics, /start_profile, --log-requests and the expert load recorder; leave it out"
_FRONT = "it is not built; leave it out"
_ROLES = "it is not built for prefill and decode servers; leave it out"
_RL = "there are no hidden states, routes or weight updates for training; leave it out"
_PROCESS = "processes are placed by the launcher; leave it out (numactl and CUDA_VISIBLE_DEVICES work from outside)"
_VLLM_LAYOUT = (
    "--tp-size counts all GPUs, --dp-size the DP ranks among them, and each of --nnodes runs an equal share; leave it out"
)

# Patterns of names without the dashes, in this order: the first that a flag's name begins with (`$`: ends with) says why.
FAMILIES: tuple[tuple[str, str], ...] = (
    (r"spec(ulative)?-|decoupled-spec|enable-multi-layer-eagle|uno-lora|enable-return-aux|return-aux", _SPECULATION),
    (r"(enable-|max-loaded-|max-)?loras?\b|max-lora|experts-shared-outer-lora", _LORA),
    (r"enable-hicache|(enable-)?(hicache|lmcache|flexkv|hisparse|unified|linker|hierarchical)\b|enable-(unified|linker)", _CACHES),
    (
        r"radix-(cache-backend|eviction-policy-config)|enable-(session-radix|page-major|kv-cache-sharding|streaming-session)",
        _CACHES,
    ),
    (r"mm-|enable-(multimodal|mm|prefix-mm|broadcast-mm)|disable-fast-image|image-|limit-mm|allowed-media|media-|trust-mm", _TEXT),
    (r"encoder-|language-|asr-|enable-adaptive-dispatch|keep-mm|enable-precise-embedding|is-embedding|prefill-only", _TEXT),
    (
        r"(max-)?mamba|linear-attn|enable-(linear|mamba|int8-mamba)|int8-mamba|linear-replay|swa-|disable-hybrid-swa|c128",
        _OTHER_MODELS,
    ),
    (r"dsa-|dsv4|qsa-|enable-(dsa|deepseek-v4|encoder-swa|decoder-swa|scattered-sconv|mis)|dllm|mlx|fuseep", _OTHER_MODELS),
    (
        r"(enable-)?(return-(hidden|routed|indexer)|rl-)|enable-return|return-hidden|sampling-mask|enable-(watermark|custom-logit)",
        _RL,
    ),
    (r"watermark|checkpoint-engine|enable-(memory-saver|weights-cpu|draft-weights)|return-(input|output)-ids", _RL),
    (
        r"weight-|custom-weight|remote-instance|modelexpress|engine-info|model-(checksum|loader|config-parser)|startup-weight",
        _WEIGHTS,
    ),
    (r"delete-ckpt|decrypted|ignore-patterns|load-snapshot|hf-(overrides|token|config)", _WEIGHTS),
    (r"modelopt|quantize-and|quantization-|torchao|enable-fp32|enable-tf32|prefill-kv-cache-dequant", _AS_STORED),
    (r"cpu-offload|offload|kt-|(enable-)?paged-experts|ple-|swap-space", _OFFLOAD),
    (r"elastic-ep|enable-elastic|ep-join|max-ep-size|use-ray|(distributed-)?executor|ray-", _ELASTIC),
    (
        r"pp-|dcp-|decode-context|attn-cp|attention-context|moe-d(p|ata)|dwdp|cp-strategy|(prefill|decode)-context-parallel",
        _PARALLEL,
    ),
    (r"enable-(prefill-cp|cp-|layernorm-sp|attn-tp|shared-experts-attn|dense-mlp|megamoe|tp-lm-head|dp-attention-)", _PARALLEL),
    (r"shared-experts-tp|disable-attn-tp|boundary-reduction|enable-dynamic-chunking|num-gpu-blocks", _PARALLEL),
    (r"data-parallel-", _VLLM_LAYOUT),
    (r"ssl-|enable-(ssl|http2|http-worker)|http2|grpc|smg-|sidecar|fastapi-root|root-path|file-storage", _TRANSPORT),
    (r"tool-|reasoning-|enable-(strict-thinking|auto-tool)|strip-thinking|response-role", _PLAIN),
    (r"grammar-|constrained-|guided-|structured-outputs|disable-outlines", _GRAMMAR),
    (
        r"((decode|mm|speculative|dsa|linear)-)?attention-(backend|config)|(fp8|fp4|bf16)-gemm|flashinfer|triton-|enable-(nccl|symm|msccl)",
        _KERNELS,
    ),
    (r"enable-(flashinfer|lean|nvidia|amd|fused|aiter|torch-symm|quant-comm|single-batch-|w4a4|waterfill)|monokernel", _KERNELS),
    (r"disable-(flashinfer|aiter)|(enforce|force)-(disable|enable|shared)|pre-warm|mooncake-ib|deepep-|sampling-backend", _KERNELS),
    (r"(enable-|disable-|debug-)?cuda-?graph|enable-(profile-cuda|cudagraph|torch-compile|layerwise)|torch-compile", _GRAPHS),
    (r"disable-decode-cuda|context-bucket|compilation-config|max-seq-len-to-capture|optimization-level", _GRAPHS),
    (r"(prefill|schedule|scheduler|scheduling|priority|retraction|default-priority|min-free)-|disable-priority", _SCHEDULING),
    (
        r"(abort-on|num-continuous|pp-max|enable-prefill-delayer|enable-pdmux|pdmux|sm-group|max-num-partial|long-prefill)",
        _SCHEDULING,
    ),
    (r"(disaggregation|optimistic-prefill|enable-pd-role|elastic)-", _ROLES),
    (
        r"log-|show-|crash-|uvicorn-|bucket-|(prompt|generation)-tokens-buckets|tokenizer-metrics|extra-metric|gc-|otlp|kv-",
        _WATCHING,
    ),
    (r"(enable-)?(trace|forward|debug|msprobe|export-metrics|collect|mfu)|enable-(request-time|mfu|forward|kv-canary)", _WATCHING),
    (r"load-publish|disable-log-stats|soft-watchdog|profiler-config|otel", _WATCHING),
    (r"base-gpu|gpu-id|numa|gated-launch|api-server-count|device-ids", _PROCESS),
    (r"(tokenizer|detokenizer|enable-tokenizer|disable-tokenizer|enable-dynamic-batch|dynamic-batch|completion-template)", _FRONT),
    (
        r"(enable-response-store|default-chat|trust-request|batch-notify|stream-|sampling-defaults|json-model|model-impl|warmups)",
        _FRONT,
    ),
)

# Environment variables of SGLang that say something here in another way.
ENVIRONMENT: dict[str, str] = {
    "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "here it is --deepep-max-dispatch-tokens-per-rank",
    "SGLANG_HOST_IP": "here it is --host",
    "SGLANG_PORT": "here it is --port",
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "here it is --disaggregation-timeout",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "here it is --disaggregation-timeout",
    "SGLANG_ENABLE_JIT_DEEPGEMM": "here it is --moe-runner-backend deep_gemm",
    "SGL_ENABLE_JIT_DEEPGEMM": "here it is --moe-runner-backend deep_gemm",
    "SGLANG_SET_CPU_AFFINITY": "numactl and taskset work from outside",
    "SGLANG_TBO_DEBUG": "/start_profile and `moesaic timeline` show what overlaps",
    "VLLM_API_KEY": "here it is --api-key",
}
# These are read here, with SGLang's meaning.
READ_VARIABLES = frozenset({"SGLANG_TORCH_PROFILER_DIR", "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"})
FOREIGN_PREFIXES = ("SGLANG_", "SGL_", "VLLM_")

# What one of our flags with choices says to a value of SGLang's.
VALUE_HINTS: dict[str, str] = {
    "--attention-backend": "auto is our own MLA (Triton on CUDA, C on a CPU); --prefill-attention-backend has others",
    "--prefill-attention-backend": "auto takes FlashInfer where it is installed",
    "--moe-a2a-backend": "torch is all_to_all_single over NCCL or gloo, symm writes into the memory of a node's GPUs",
    "--moe-runner-backend": "auto chooses by shape among those that are there",
    "--ep-dispatch-algorithm": "balanced is the optimum of each batch",
    "--expert-balancedness-report-mode": "/metrics always has moesaic:eplb_balancedness where experts move",
    "--expert-distribution-recorder-mode": "stat counts exactly",
    "--load-balance-method": "prefill's DP rank of a room is always room % dp_size",
    "--load-format": "weights come from *.safetensors files",
    "--quantization": "auto takes what the checkpoint is stored in",
    "--dtype": "float16 is not built",
    "--disaggregation-transfer-backend": "rooms with bootstrap_host 2.2.2.2 take a fake transfer",
}
