"""More cases of benchmarks/h200.py: the FP8 products that every token meets, from DeepSeek-V3's projections to its dense layers.

Sizes, names and helpers are those of h200_cases.py. Peers: DeepGEMM, and the product with the dequantised weight in bf16, which
reads twice the bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import h200_cases as base
import torch
from h200_cases import Call, Case, Ready, relative_error
from torch import Tensor

from moesaic.kernels.fp8_gemm import fp8_gemm, fp8_gemm_reference
from moesaic.kernels.fp8_rows import quantized_rows
from moesaic.kernels.grouped_backends import DENSE_NAMES, Name, unfit_reason
from moesaic.kernels.quant import dequantize_blocks_reference, quantize_blocks_reference

QUERY_LATENT, DENSE = 1536, 9
"""q_lora_rank; a dense layer is so many times as wide as an expert."""
CHECKED = 64


def dense_cases() -> list[Case]:
    """In the order in which they run."""
    return [_product(tokens, *weight) for tokens in (128, 4096) for weight in _weights()] + [
        _product(tokens, *_weights()[0]) for tokens in (32, 64, 256)
    ]


def _weights() -> list[tuple[str, int, int]]:
    """What it is, [out, in]."""
    hidden, inner = base.HIDDEN, base.INTERMEDIATE
    return [
        ("q_a and kv_a", QUERY_LATENT + base.LATENT + base.KEY, hidden),
        ("q_b", base.HEADS * (base.NOPE + base.KEY), QUERY_LATENT),
        ("o", hidden, base.HEADS * base.VALUE),
        ("dense gate and up", 2 * DENSE * inner, hidden),
        ("dense down", hidden, DENSE * inner),
        ("shared gate and up", 2 * inner, hidden),
        ("shared down", hidden, inner),
    ]


def _product(tokens: int, what: str, width: int, depth: int) -> Case:
    row_bytes = depth + 4 * -(-depth // 128)

    def make() -> Ready:
        weight, scales = quantize_blocks_reference(base.random(width, depth))
        x = base.random(tokens, depth)
        rows, plain = quantized_rows(x), dequantize_blocks_reference(weight, scales, torch.bfloat16)

        def by(name: Name) -> Callable[[], Tensor]:
            return lambda: fp8_gemm(rows.values, rows.scales, weight, scales, backends=(name,))

        ours = by("torch" if base.DEVICE == "cpu" else "triton")

        def error() -> float:
            exact = fp8_gemm_reference(rows.values[:CHECKED], rows.scales[:CHECKED], weight, scales, out_dtype=torch.float32)
            return relative_error(ours()[:CHECKED], exact)

        peers: dict[str, Call] = {name: by(name) for name in DENSE_NAMES if _fits(name)}
        peers["bf16"] = lambda: torch.nn.functional.linear(x, plain)
        return Ready(ours=ours, error=error, peers=peers)

    return Case(
        name="fp8_gemm",
        size=f"{tokens} tokens, {what} [{width}, {depth}]",
        num_bytes=width * depth + 4 * -(-width // 128) * -(-depth // 128) + tokens * (row_bytes + 2 * width),
        num_flops=2 * tokens * width * depth,
        matmul="fp8",
        make=make,
        in_quick=what in ("q_a and kv_a", "shared gate and up") and tokens in (128, 4096),
    )


def _fits(name: Name) -> bool:
    if base.DEVICE == "cpu" or name in ("triton", "torch"):
        return False
    return unfit_reason(name, torch.cuda.get_device_capability()) is None
