"""What rank_slice.py measures: whose rank, how many tokens, how long a context, how unevenly loaded. And the two models.

The published deployments first (REFERENCE.md): SGLang's prefill on EP 32 and decode on EP 72 with 288 slots; then other sizes,
skew, and DeepSeek's decode on EP 144.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bare_import  # noqa: F401  before anything of moesaic
from slice_network import Exchange, low_latency_s, normal_s
from slice_roofline import Share
from slice_traffic import RankPlace, expected_received, expert_counts

from moesaic.launch.models.config import ModelConfig, parse_model_config
from moesaic.moe.dispatch_mode import DispatchMode

Phase = Literal["prefill", "decode"]

PAGE_SIZE = 64
_COMMON: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"], "n_shared_experts": 1, "routed_scaling_factor": 2.5}
_RELEASED: dict[str, Any] = json.loads(Path(__file__).with_name("deepseek_v3.json").read_text(encoding="utf-8"))
DEEPSEEK_V3 = parse_model_config({name: value for name, value in _RELEASED.items() if name != "quantization_config"})
"""The released config.json's numbers; what is quantised the slice says itself."""
TINY = parse_model_config(
    _COMMON
    | {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "n_routed_experts": 16,
        "kv_lora_rank": 64,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "qk_nope_head_dim": 32,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 256,
    }
)
"""For `--cpu-tiny`."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """context: tokens of each prompt (prefill) or of KV per sequence (decode). published: what it is held against, by name."""

    phase: Phase
    ep_size: int
    num_slots: int
    num_tokens: int
    context: int
    balancedness: float = 1.0
    in_quick: bool = False
    published: str | None = None

    @property
    def name(self) -> str:
        skew = "" if self.balancedness == 1 else f" balancedness {self.balancedness:g}"
        return f"{self.phase} EP{self.ep_size} {self.num_tokens} x {self.context}{skew}"

    @property
    def mode(self) -> DispatchMode:
        return DispatchMode.LOW_LATENCY if self.phase == "decode" else DispatchMode.NORMAL

    @property
    def num_prompts(self) -> int:
        return -(-self.num_tokens // self.context)

    @property
    def kv_tokens(self) -> int:
        """Room in whole pages."""
        sequences = self.num_tokens if self.phase == "decode" else self.num_prompts
        return sequences * -(-self.context // PAGE_SIZE) * PAGE_SIZE

    def place(self, config: ModelConfig) -> RankPlace:
        return RankPlace(
            ep_size=self.ep_size,
            num_slots=self.num_slots,
            num_experts=config.n_routed_experts,
            topk=config.num_experts_per_tok,
        )

    def share(self, config: ModelConfig, activation_bytes: int = 2) -> Share:
        """For the roofline. Prompts are of equal length but for rounding."""
        place, decode = self.place(config), self.phase == "decode"
        counts = expert_counts(place, self.num_tokens, self.balancedness, 0).tolist()
        prompt = self.num_tokens / self.num_prompts
        return Share(
            decode=decode,
            num_tokens=self.num_tokens,
            num_pairs=self.num_tokens * self.context if decode else round(self.num_tokens * (prompt + 1) / 2),
            num_context=self.num_tokens * self.context if decode else self.kv_tokens,
            num_logits=self.num_tokens if decode else self.num_prompts,
            num_local=place.num_local,
            num_rows=sum(counts),
            num_received=expected_received(counts, self.num_tokens * self.ep_size),
            activation_bytes=activation_bytes,
        )

    def communication_s(self, config: ModelConfig, num_tokens: int) -> tuple[float, float]:
        """Tabulated seconds of one layer's dispatch and combine when every rank dispatches `num_tokens`."""
        exchange = Exchange(
            ep_size=self.ep_size,
            num_tokens=num_tokens,
            hidden=config.hidden_size,
            topk=config.num_experts_per_tok,
            topk_groups=config.topk_group,
            balancedness=self.balancedness,
        )
        seconds: Callable[..., float] = low_latency_s if self.phase == "decode" else normal_s
        return seconds("dispatch", exchange), seconds("combine", exchange)


def all_cases() -> list[Case]:
    """In the order in which they run: cases of one layout together, the published settings first."""
    prefill = [_prefill(16384, length, published=f"SGLang prefill {length}") for length in (2048, 1024, 4096)]
    decode = [_decode(256, 2048, published="SGLang decode"), _decode(128, 2048), _decode(128, 4096), _decode(256, 4096)]
    skews = (0.5, 0.7, 0.85, 0.95)
    return [
        *prefill,
        *(_prefill(16384, 2048, balancedness=skew) for skew in skews),
        *(_prefill(tokens, length) for tokens in (8192, 4096) for length in (1024, 2048, 4096)),
        *decode,
        *(_decode(256, 2048, balancedness=skew) for skew in skews),
        *(_decode(tokens, context) for tokens in (32, 64) for context in (2048, 4096)),
        _decode(128, 4096, ep_size=144, published="DeepSeek decode"),
    ]


def tiny_cases() -> list[Case]:
    """Reduced in every size: 24 slots on 8 ranks."""
    return [
        Case(phase="prefill", ep_size=8, num_slots=24, num_tokens=48, context=24, in_quick=True),
        Case(phase="prefill", ep_size=8, num_slots=24, num_tokens=48, context=48, balancedness=0.5),
        Case(phase="decode", ep_size=8, num_slots=24, num_tokens=8, context=70, in_quick=True),
    ]


def _prefill(tokens: int, length: int, *, balancedness: float = 1.0, published: str | None = None) -> Case:
    quick = (tokens, length, balancedness) == (16384, 2048, 1.0)
    return Case(
        phase="prefill",
        ep_size=32,
        num_slots=288,
        num_tokens=tokens,
        context=length,
        balancedness=balancedness,
        in_quick=quick,
        published=published,
    )


def _decode(tokens: int, context: int, *, balancedness: float = 1.0, ep_size: int = 72, published: str | None = None) -> Case:
    quick = (tokens, context, balancedness) == (256, 2048, 1.0)
    return Case(
        phase="decode",
        ep_size=ep_size,
        num_slots=288,
        num_tokens=tokens,
        context=context,
        balancedness=balancedness,
        in_quick=quick,
        published=published,
    )
