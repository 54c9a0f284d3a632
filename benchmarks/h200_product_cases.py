"""Cases of benchmarks/h200.py: grouped products of Triton beside DeepGEMM and torch, and weights out of FP8 blocks.

Sizes and helpers are those of h200_cases.py.
"""

from __future__ import annotations

import importlib.util

import h200_cases as base
import torch
from h200_cases import Call, Case, Ready, relative_error
from torch import Tensor

from moesaic.kernels import grouped_gemm, quant


def product_cases() -> list[Case]:
    """In the order in which they run."""
    return [
        *(case for tokens in (128, 32, 64, 256) for ranks in (32, 72) for case in _decode_expert_cases(tokens, ranks)),
        *(case for tokens in (4096, 8192, 16384) for case in _prefill_expert_cases(tokens)),
        _weights(),
    ]


def _decode_expert_cases(tokens: int, ranks: int) -> list[Case]:
    """The masked layout of one rank: room for every token of every rank, filled as an even gate would, give or take."""
    experts, room = (8, ranks * tokens) if ranks == 32 else (4, ranks * tokens)
    mean = ranks * tokens * base.TOPK // (ranks * experts)
    counts = [max(1, mean + mean * (index % 3 - 1) // 4) for index in range(experts)]
    cases = []
    for width, depth in ((2 * base.INTERMEDIATE, base.HIDDEN), (base.HIDDEN, base.INTERMEDIATE)):
        size = f"EP {ranks}, {tokens} tokens, {experts} x ~{mean} rows, [{width}, {depth}]"
        rows = sum(counts)
        in_quick = tokens == 128 and ranks == 32
        flops = 2 * rows * width * depth

        def fp8(width: int = width, depth: int = depth) -> Ready:
            weight, scales = base.fp8_weights(experts, width, depth)
            x = base.random(experts, room, depth)
            quantized, x_scales = quant.quantize_per_token(x.view(-1, depth))
            own = quant.empty_scales(x, mn_major=True).copy_(x_scales.view(experts, room, -1))
            on_device, quantized = torch.tensor(counts, device=base.DEVICE), quantized.view(experts, room, depth)

            def ours() -> Tensor:
                return grouped_gemm.grouped_gemm_fp8_masked(quantized, own, weight, scales, on_device, expected_rows=mean)

            def error() -> float:
                got, worst = ours(), 0.0
                for expert, count in enumerate(counts):
                    part = slice(expert * room, expert * room + count)
                    exact = grouped_gemm.grouped_gemm_fp8_contiguous_reference(
                        quantized[expert, :count], x_scales[part], weight[expert : expert + 1], scales[expert : expert + 1], [count]
                    )
                    worst = max(worst, relative_error(got[expert, :count], exact))
                return worst

            peers = deep_gemm_masked(quantized, own, weight, scales, counts=on_device, mean=mean)
            return Ready(ours=ours, error=error, peers=peers, specified=lambda: base.valid_rows(ours(), counts))

        def plain(width: int = width, depth: int = depth) -> Ready:
            x, weight = base.random(experts, room, depth), base.random(experts, width, depth)
            on_device = torch.tensor(counts, device=base.DEVICE)

            def ours() -> Tensor:
                return grouped_gemm.grouped_gemm_masked(x, weight, on_device, expected_rows=mean)

            def error() -> float:
                got = ours()
                return max(
                    relative_error(got[expert, :count], x[expert, :count].float() @ weight[expert].float().t())
                    for expert, count in enumerate(counts)
                )

            largest = max(counts)
            return Ready(
                ours=ours,
                error=error,
                specified=lambda: base.valid_rows(ours(), counts),
                peers={"torch bmm of the valid part": lambda: torch.bmm(x[:, :largest], weight.transpose(1, 2))},
            )

        cases.append(
            Case(
                name="grouped_gemm_fp8_masked",
                size=size,
                num_bytes=experts * width * depth + rows * (depth + 2 * width),
                num_flops=flops,
                matmul="fp8",
                make=fp8,
                in_quick=in_quick,
            )
        )
        cases.append(
            Case(
                name="grouped_gemm_masked",
                size=size,
                num_bytes=2 * (experts * width * depth + rows * (depth + width)),
                num_flops=flops,
                make=plain,
                in_quick=in_quick,
            )
        )
    return cases


def deep_gemm_masked(x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, *, counts: Tensor, mean: int) -> dict[str, Call]:
    """DeepGEMM on the same tensors, where it is importable."""
    if importlib.util.find_spec("deep_gemm") is None:
        return {}
    import deep_gemm

    out = torch.empty(*x.shape[:2], weight.shape[1], device=x.device, dtype=torch.bfloat16)
    masked = counts.int()

    def call() -> Tensor:
        deep_gemm.m_grouped_fp8_gemm_nt_masked((x, x_scales), (weight, scales), out, masked, mean)
        return out

    return {"deep_gemm": call}


def _prefill_expert_cases(tokens: int) -> list[Case]:
    """The contiguous layout of a rank of EP 32: as many rows as its own tokens have choices, 8 experts, multiples of 128."""
    experts, mean = 8, tokens * base.TOPK // 8
    counts = [max(128, (mean + mean * (index % 3 - 1) // 4) // 128 * 128) for index in range(experts)]
    rows, cases = sum(counts), []
    for width, depth in ((2 * base.INTERMEDIATE, base.HIDDEN), (base.HIDDEN, base.INTERMEDIATE)):
        size = f"{rows} rows, {experts} experts, [{width}, {depth}]"
        flops = 2 * rows * width * depth

        def fp8(width: int = width, depth: int = depth) -> Ready:
            weight, scales = base.fp8_weights(experts, width, depth)
            quantized, x_scales = quant.quantize_per_token(base.random(rows, depth), mn_major_scales=True)

            def ours() -> Tensor:
                return grouped_gemm.grouped_gemm_fp8_contiguous(quantized, x_scales, weight, scales, counts)

            def error() -> float:
                exact = grouped_gemm.grouped_gemm_fp8_contiguous_reference(
                    quantized[: counts[0]], x_scales[: counts[0]], weight[:1], scales[:1], counts[:1]
                )
                return relative_error(ours()[: counts[0]], exact)

            return Ready(ours=ours, error=error, peers=deep_gemm_contiguous(quantized, x_scales, weight, scales, counts))

        def plain(width: int = width, depth: int = depth) -> Ready:
            x, weight = base.random(rows, depth), base.random(experts, width, depth)
            ends = torch.tensor(counts, device=base.DEVICE).cumsum(0).int()

            def ours() -> Tensor:
                return grouped_gemm.grouped_gemm_contiguous(x, weight, counts)

            def error() -> float:
                return relative_error(ours()[-counts[-1] :], x[-counts[-1] :].float() @ weight[-1].float().t())

            peers: dict[str, Call] = {
                "torch loop": lambda: torch.cat([p @ w.t() for p, w in zip(x.split(counts), weight, strict=True)])
            }
            if hasattr(torch, "_grouped_mm"):
                peers["torch grouped_mm"] = lambda: torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
            return Ready(ours=ours, error=error, peers=peers)

        shared = {"size": size, "num_flops": flops, "captured": False, "in_quick": tokens == 4096}
        fp8_bytes, plain_bytes = (
            experts * width * depth + rows * (depth + 2 * width),
            2 * (experts * width * depth + rows * (depth + width)),
        )
        cases.append(Case(name="grouped_gemm_fp8_contiguous", num_bytes=fp8_bytes, matmul="fp8", make=fp8, **shared))
        cases.append(Case(name="grouped_gemm_contiguous", num_bytes=plain_bytes, make=plain, **shared))
    return cases


def deep_gemm_contiguous(x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, counts: list[int]) -> dict[str, Call]:
    """DeepGEMM on the same tensors, where it is importable."""
    if importlib.util.find_spec("deep_gemm") is None:
        return {}
    import deep_gemm

    out = torch.empty(x.shape[0], weight.shape[1], device=x.device, dtype=torch.bfloat16)
    expert_of_row = torch.arange(len(counts), device=x.device).repeat_interleave(torch.tensor(counts, device=x.device)).int()

    def call() -> Tensor:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((x, x_scales), (weight, scales), out, expert_of_row)
        return out

    return {"deep_gemm": call}


def _weights() -> Case:
    def make() -> Ready:
        quantized, scales = quant.quantize_blocks_reference(base.random(8 * 2 * base.INTERMEDIATE, base.HIDDEN))

        def ours() -> Tensor:
            return quant.dequantize_blocks(quantized, scales, torch.bfloat16)

        exact = quant.dequantize_blocks_reference(quantized, scales, torch.bfloat16)
        return Ready(
            ours=ours,
            error=lambda: relative_error(ours(), exact),
            peers={"torch": lambda: quant.dequantize_blocks_reference(quantized, scales, torch.bfloat16)},
        )

    elements = 8 * 2 * base.INTERMEDIATE * base.HIDDEN
    return Case(name="dequantize_blocks", size="8 experts", num_bytes=3 * elements, make=make, in_quick=True, target=0.85)
