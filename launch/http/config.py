"""What the HTTP process has to be told. Filled in by the launcher; nothing here is resolved or guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """Settings of one HTTP process.

    Ranks are numbered `dp_rank * attn_tp_size + attn_tp_rank`; `to_rank_endpoints[rank]` is bound here and the rank
    connects. `eos_token_ids` end every sequence unless `ignore_eos`. `default_sampling` holds native sampling names
    (from the checkpoint's generation_config.json) used where a request says nothing; `random_seed` decides the seeds
    that such requests get (None: chance). `max_queued_requests` None: no limit. `role` is --disaggregation-mode; `bootstrap_port`
    holds for requests that give none. `log_level_http`: of uvicorn; "info" and "debug" log every HTTP request.
    `log_requests_level` None: requests are not logged. `server_args`, `resolution` and `memory_plan` are shown in /server_info as
    they are. Times are seconds.
    """

    model_path: str
    served_model_name: str
    context_length: int
    vocab_size: int
    to_rank_endpoints: tuple[str, ...]
    from_rank_endpoint: str
    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str | None = None
    tokenizer_path: str | None = None
    dp_size: int = 1
    attn_tp_size: int = 1
    world_size: int = 1
    load_balance_method: str = "auto"
    max_queued_requests: int | None = None
    max_running_requests: int = 256
    random_seed: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: Mapping[str, object] = field(default_factory=dict)
    architectures: tuple[str, ...] = ("DeepseekV3ForCausalLM",)
    model_type: str = "deepseek_v3"
    server_args: Mapping[str, object] = field(default_factory=dict)
    resolution: tuple[Mapping[str, object], ...] = ()
    memory_plan: Mapping[str, object] = field(default_factory=dict)
    role: Literal["null", "prefill", "decode"] = "null"
    bootstrap_port: int = 8998
    version: str = "0"
    log_level: str = "info"
    log_level_http: str = "warning"
    log_requests_level: Literal[0, 1, 2, 3] | None = None
    heartbeat_deadline: float = 5.0
    watchdog_timeout: float = 300.0
    health_generate_deadline: float = 20.0
    drain_seconds: float = 3.0

    def __post_init__(self) -> None:
        if self.world_size != self.dp_size * self.attn_tp_size:
            raise ValueError(f"world_size {self.world_size} is not dp_size {self.dp_size} x attn_tp_size {self.attn_tp_size}")
        if len(self.to_rank_endpoints) != self.world_size:
            raise ValueError(f"{len(self.to_rank_endpoints)} endpoints for {self.world_size} ranks")
