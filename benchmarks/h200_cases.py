"""What a case of benchmarks/h200.py is, DeepSeek-V3's sizes, and what the files of cases share. Knows no kernel but quantisation.

A case states the bytes that must move (each input read once, each output written once) and the floating-point operations that
must be done; its tensors are made only when it runs. Tokens are per rank. A rank of EP 32 holds 8 experts, a rank of EP 72 (with 32
redundant experts) holds 4.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import bare_import  # noqa: F401  before anything of moesaic
import torch
from torch import Tensor

from moesaic.kernels import quant

_MODEL = json.loads(Path(__file__).with_name("deepseek_v3.json").read_text(encoding="utf-8"))
HIDDEN, INTERMEDIATE, VOCABULARY = _MODEL["hidden_size"], _MODEL["moe_intermediate_size"], _MODEL["vocab_size"]
EXPERTS, TOPK, GROUPS, TOPK_GROUPS = (_MODEL[name] for name in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"))
HEADS, LATENT, KEY = _MODEL["num_attention_heads"], _MODEL["kv_lora_rank"], _MODEL["qk_rope_head_dim"]
NOPE, VALUE = _MODEL["qk_nope_head_dim"], _MODEL["v_head_dim"]
PAGE = 64
DEVICE = "cuda"
Call = Callable[[], "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A case with its tensors: our call, the error of its result against a reference, and who else computes it.

    Without `repeats` a call works in place, so that a second one sees other values. `specified` is what of the call's result has a
    meaning, where not all has: only that must repeat.
    """

    ours: Call
    error: Callable[[], float]
    peers: dict[str, Call] = field(default_factory=dict)
    repeats: bool = True
    specified: Call | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """`matmul` says which ceiling the operations are held against. Without `captured`, a call waits for the CPU: no graph."""

    name: str
    size: str
    num_bytes: int
    make: Callable[[], Ready]
    num_flops: int = 0
    matmul: str = "bf16"
    tolerance: float = 0.01
    captured: bool = True
    in_quick: bool = False
    target: float | None = None
    target_us: float | None = None


def valid_rows(got: Tensor, counts: list[int]) -> Tensor:
    """Of [experts, room, N], the first `counts` rows of each expert."""
    return torch.cat([rows[:count] for rows, count in zip(got, counts, strict=True)])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; not a number if one is."""
    return ((got.float() - exact.float()).norm() / exact.float().norm()).item()


def compiled(reference: Call, *, wanted: bool) -> dict[str, Call]:
    """What torch.compile makes of a reference, as a peer. It compiles for seconds, so not for every size; never without CUDA."""
    return {"torch.compile": torch.compile(reference)} if wanted and torch.version.cuda is not None else {}


def fp8_error(result: object, exact: Tensor) -> float:
    """Of (fp8, scales, ...), dequantised."""
    assert isinstance(result, tuple)
    return relative_error(quant.dequantize_per_token_reference(result[0], result[1], torch.float32), exact)


def fp8_weights(experts: int, width: int, depth: int) -> tuple[Tensor, Tensor]:
    pairs = [quant.quantize_blocks_reference(random(width, depth)) for _ in range(experts)]
    return torch.stack([quantized for quantized, _ in pairs]), torch.stack([scales for _, scales in pairs])
