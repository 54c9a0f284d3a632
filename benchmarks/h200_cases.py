"""What benchmarks/h200.py measures: every device kernel at DeepSeek-V3's sizes, with its floor, its check and its peers.

A case states the bytes that must move (each input read once, each output written once) and the floating-point operations that
must be done; its tensors are made only when it runs. Sizes: hidden 7168, intermediate 2048, 256 experts, top-8, 128 heads; tokens
are per rank. A rank of EP 32 holds 8 experts, a rank of EP 72 (with 32 redundant experts) holds 4.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import bare_import  # noqa: F401  before anything of moesaic
import torch
from torch import Tensor

from moesaic.kernels import activation, grouped_gemm, latent_write, mla_decode, norm, permute, quant, replica_choice, rope, topk

HIDDEN, INTERMEDIATE, EXPERTS, TOPK, HEADS, LATENT, KEY, PAGE = 7168, 2048, 256, 8, 128, 512, 64, 64
DEVICE = "cuda"
Call = Callable[[], "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A case with its tensors: our call, the error of its result against a reference, and who else computes it.

    Without `repeats` a call works in place, so that a second one sees other values.
    """

    ours: Call
    error: Callable[[], float]
    peers: dict[str, Call] = field(default_factory=dict)
    repeats: bool = True


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


def all_cases() -> list[Case]:
    """In the order in which they run."""
    return [
        *(case for tokens in (128, 32, 64, 256, 4096, 8192, 16384) for case in _row_cases(tokens)),
        *(case for tokens in (128, 32, 64, 256) for ranks in (32, 72) for case in _decode_expert_cases(tokens, ranks)),
        *(case for tokens in (4096, 8192, 16384) for case in _prefill_expert_cases(tokens)),
        *(_mla(tokens, context, fp8) for context in (4096, 1024, 16384) for tokens in (128, 32, 64, 256) for fp8 in (False, True)),
        _weights(),
    ]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; not a number if one is."""
    return ((got.float() - exact.float()).norm() / exact.float().norm()).item()


def _fp8_error(result: object, exact: Tensor) -> float:
    """Of (fp8, scales, ...), dequantised."""
    assert isinstance(result, tuple)
    return relative_error(quant.dequantize_per_token_reference(result[0], result[1], torch.float32), exact)


def _row_cases(tokens: int) -> list[Case]:
    in_quick, size = tokens in {128, 4096}, f"{tokens} tokens"
    elements, scale_bytes = tokens * HIDDEN, tokens * HIDDEN // 128 * 4

    def quantisation() -> Ready:
        x = _random(tokens, HIDDEN)
        return Ready(
            ours=lambda: quant.quantize_per_token(x, mn_major_scales=True),
            error=lambda: _fp8_error(quant.quantize_per_token(x), x),
            peers={"torch": lambda: quant.quantize_per_token_reference(x)},
        )

    def norms() -> Ready:
        x, residual, gamma = _random(tokens, HIDDEN), _random(tokens, HIDDEN), _random(HIDDEN)
        exact = norm.rms_norm_reference((x + residual).float(), gamma.float(), 1e-6)

        def chain() -> tuple[Tensor, ...]:
            normed, total = norm.add_rms_norm(x, residual, gamma, 1e-6)
            return (*quant.quantize_per_token(normed, mn_major_scales=True), total)

        def by_torch() -> tuple[Tensor, ...]:
            return norm.add_rms_norm_quantize_reference(x, residual, gamma, 1e-6)

        def ours() -> tuple[Tensor, ...]:
            return norm.add_rms_norm_quantize(x, residual, gamma, 1e-6, mn_major_scales=True)

        return Ready(ours=ours, error=lambda: _fp8_error(ours(), exact), peers={"unfused": chain, "torch": by_torch})

    def swiglu() -> Ready:
        gate_up = _random(tokens * TOPK, 2 * INTERMEDIATE)

        def chain() -> tuple[Tensor, ...]:
            return quant.quantize_per_token(activation.swiglu(gate_up), mn_major_scales=True)

        return Ready(
            ours=lambda: activation.swiglu_quantize(gate_up, mn_major_scales=True),
            error=lambda: _fp8_error(activation.swiglu_quantize(gate_up), activation.swiglu_reference(gate_up.float())),
            peers={"unfused": chain, "torch": lambda: activation.swiglu_quantize_reference(gate_up)},
        )

    inner = tokens * TOPK * INTERMEDIATE
    big = 0.85 if tokens >= 4096 else None
    memory = {"in_quick": in_quick, "target": big, "tolerance": 0.04}
    return [
        Case(name="quantize_per_token", size=size, num_bytes=3 * elements + scale_bytes, make=quantisation, **memory),
        Case(name="add_rms_norm_quantize", size=size, num_bytes=7 * elements + scale_bytes, make=norms, **memory),
        Case(name="swiglu_quantize", size=f"{tokens * TOPK} rows", num_bytes=5 * inner + inner // 32, make=swiglu, **memory),
        _gate(tokens, in_quick),
        *_latent(tokens, in_quick),
        *_exchange(tokens, in_quick),
    ]


def _gate(tokens: int, in_quick: bool) -> Case:
    def make() -> Ready:
        logits = torch.randn(tokens, EXPERTS, device=DEVICE)
        bias = torch.randn(EXPERTS, device=DEVICE) * 0.1
        table = replica_choice.ReplicaTable(
            slots=torch.arange(EXPERTS * 2, device=DEVICE).view(EXPERTS, 2),
            num_replicas=torch.randint(1, 3, (EXPERTS,), device=DEVICE),
            step=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        )
        options = {"num_groups": 8, "topk_groups": 4, "topk": TOPK, "normalize": True, "scaling_factor": 2.5}

        def ours() -> tuple[Tensor, ...]:
            return topk.grouped_topk_slots(logits, bias, table, **options)

        def by_torch() -> tuple[Tensor, ...]:
            ids, weights = topk.grouped_topk_reference(logits, bias, **options)
            return ids, weights, replica_choice.choose_replicas_reference(ids, table)

        def error() -> float:
            """Share of choices that differ (scores may tie within a rounding), and of weights."""
            (ids, weights, slots), (other_ids, other_weights, other_slots) = ours(), by_torch()
            differ = ((ids != other_ids) | (slots != other_slots)).float().mean().item()
            return differ + relative_error(weights, other_weights)

        return Ready(ours=ours, error=error, peers={"torch": by_torch})

    num_bytes = tokens * (EXPERTS * 4 + TOPK * 20)
    target_us = 12.0 if tokens <= 256 else None
    return Case(
        name="grouped_topk_slots", size=f"{tokens} tokens", num_bytes=num_bytes, make=make, in_quick=in_quick, target_us=target_us
    )


def _latent(tokens: int, in_quick: bool) -> list[Case]:
    def rotation() -> tuple[Tensor, Tensor]:
        table = rope.rope_table(rope.RopeConfig(dim=KEY, theta=10000.0), 16384).to(DEVICE)
        return table, torch.randint(0, 16384, (tokens,), device=DEVICE)

    def rotate() -> Ready:
        table, positions = rotation()
        x = _random(tokens, HEADS, KEY)
        exact = rope.apply_rope_reference(x.float(), table, positions)
        return Ready(
            ours=lambda: rope.apply_rope(x, table, positions),
            error=lambda: relative_error(rope.apply_rope(x.clone(), table, positions), exact),
            repeats=False,
            peers={"torch": lambda: rope.apply_rope_reference(x, table, positions)},
        )

    def write(dtype: torch.dtype) -> Ready:
        table, positions = rotation()
        projected, gamma = _random(tokens, LATENT + KEY), _random(LATENT)
        slots = torch.randperm(4 * tokens, device=DEVICE)[:tokens]
        pool = torch.zeros(4 * tokens, LATENT + KEY, device=DEVICE).to(dtype)
        options = {"table": table, "positions": positions, "slots": slots}

        def ours() -> Tensor:
            latent_write.write_latent(projected, gamma, 1e-6, pool_rows=pool, kv_scale=scale, **options)
            return pool

        def by_torch() -> Tensor:
            latent_write.write_latent_reference(projected, gamma, 1e-6, pool_rows=pool, kv_scale=scale, **options)
            return pool

        def error() -> float:
            exact = torch.zeros(pool.shape, device=DEVICE)
            latent_write.write_latent_reference(projected.float(), gamma.float(), 1e-6, pool_rows=exact, **options)
            return relative_error(ours()[slots].float() * scale, exact[slots])

        scale = 0.05 if dtype is quant.FP8 else 1.0
        return Ready(ours=ours, error=error, peers={"torch": by_torch})

    width, size = LATENT + KEY, f"{tokens} tokens"
    return [
        Case(name="apply_rope", size=size, num_bytes=tokens * (HEADS * KEY * 4 + KEY * 4), make=rotate, in_quick=in_quick),
        Case(
            name="write_latent bf16", size=size, num_bytes=tokens * width * 4, make=lambda: write(torch.bfloat16), in_quick=in_quick
        ),
        Case(
            name="write_latent fp8",
            size=size,
            num_bytes=tokens * width * 3,
            make=lambda: write(quant.FP8),
            tolerance=0.04,
            in_quick=in_quick,
        ),
    ]


def _exchange(tokens: int, in_quick: bool) -> list[Case]:
    """One rank's choices, all of them local: every token goes to 8 rows and comes back from them."""
    rows = tokens * TOPK

    def choices() -> Tensor:
        return torch.rand(tokens, EXPERTS, device=DEVICE).topk(TOPK, dim=-1).indices

    def layout() -> Ready:
        ids = choices()
        expected = permute.masked_map_reference(ids, EXPERTS, tokens)
        return Ready(
            ours=lambda: permute.masked_map(ids, EXPERTS, tokens).row,
            error=lambda: float((permute.masked_map(ids, EXPERTS, tokens).row != expected.row).any()),
            peers={"torch": lambda: permute.masked_map_reference(ids, EXPERTS, tokens).row},
        )

    def spread() -> Ready:
        row_map, _ = permute.contiguous_map(choices(), EXPERTS, 1)
        hidden = _random(tokens, HIDDEN)
        return Ready(
            ours=lambda: permute.to_rows(hidden, row_map, zero_padding=False),
            error=lambda: relative_error(permute.to_rows(hidden, row_map), permute.to_rows_reference(hidden, row_map)),
            peers={"torch": lambda: permute.to_rows_reference(hidden, row_map)},
        )

    def combine() -> Ready:
        row_map, _ = permute.contiguous_map(choices(), EXPERTS, 1)
        expert_rows, weights = _random(rows, HIDDEN), torch.rand(tokens, TOPK, device=DEVICE)

        def by_torch() -> Tensor:
            return permute.weighted_sum(permute.from_rows_reference(expert_rows, row_map), weights)

        return Ready(
            ours=lambda: permute.weighted_rows(expert_rows, row_map, weights),
            error=lambda: relative_error(permute.weighted_rows(expert_rows, row_map, weights), by_torch()),
            peers={"torch": by_torch},
        )

    moved = (tokens + rows) * HIDDEN * 2
    size, target = f"{tokens} tokens", 0.85 if tokens >= 4096 else None
    return [
        Case(name="masked_map", size=size, num_bytes=rows * 25, make=layout, tolerance=0.0, in_quick=in_quick),
        Case(name="to_rows", size=size, num_bytes=moved, make=spread, tolerance=0.0, in_quick=in_quick, target=target),
        Case(name="weighted_rows", size=size, num_bytes=moved, make=combine, in_quick=in_quick, target=target),
    ]


def _fp8_weights(experts: int, width: int, depth: int) -> tuple[Tensor, Tensor]:
    pairs = [quant.quantize_blocks_reference(_random(width, depth)) for _ in range(experts)]
    return torch.stack([quantized for quantized, _ in pairs]), torch.stack([scales for _, scales in pairs])


def _decode_expert_cases(tokens: int, ranks: int) -> list[Case]:
    """The masked layout of one rank: room for every token of every rank, filled as an even gate would, give or take."""
    experts, room = (8, ranks * tokens) if ranks == 32 else (4, ranks * tokens)
    mean = ranks * tokens * TOPK // (ranks * experts)
    counts = [max(1, mean + mean * (index % 3 - 1) // 4) for index in range(experts)]
    cases = []
    for width, depth in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        size = f"EP {ranks}, {tokens} tokens, {experts} x ~{mean} rows, [{width}, {depth}]"
        rows = sum(counts)
        in_quick = tokens == 128 and ranks == 32
        flops = 2 * rows * width * depth

        def fp8(width: int = width, depth: int = depth) -> Ready:
            weight, scales = _fp8_weights(experts, width, depth)
            x = _random(experts, room, depth)
            quantized, x_scales = quant.quantize_per_token(x.view(-1, depth))
            own = quant.empty_scales(x, mn_major=True).copy_(x_scales.view(experts, room, -1))
            on_device, quantized = torch.tensor(counts, device=DEVICE), quantized.view(experts, room, depth)

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
            return Ready(ours=ours, error=error, peers=peers)

        def plain(width: int = width, depth: int = depth) -> Ready:
            x, weight = _random(experts, room, depth), _random(experts, width, depth)
            on_device = torch.tensor(counts, device=DEVICE)

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
    experts, mean = 8, tokens * TOPK // 8
    counts = [max(128, (mean + mean * (index % 3 - 1) // 4) // 128 * 128) for index in range(experts)]
    rows, cases = sum(counts), []
    for width, depth in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        size = f"{rows} rows, {experts} experts, [{width}, {depth}]"
        flops = 2 * rows * width * depth

        def fp8(width: int = width, depth: int = depth) -> Ready:
            weight, scales = _fp8_weights(experts, width, depth)
            quantized, x_scales = quant.quantize_per_token(_random(rows, depth), mn_major_scales=True)

            def ours() -> Tensor:
                return grouped_gemm.grouped_gemm_fp8_contiguous(quantized, x_scales, weight, scales, counts)

            def error() -> float:
                exact = grouped_gemm.grouped_gemm_fp8_contiguous_reference(
                    quantized[: counts[0]], x_scales[: counts[0]], weight[:1], scales[:1], counts[:1]
                )
                return relative_error(ours()[: counts[0]], exact)

            return Ready(ours=ours, error=error, peers=deep_gemm_contiguous(quantized, x_scales, weight, scales, counts))

        def plain(width: int = width, depth: int = depth) -> Ready:
            x, weight = _random(rows, depth), _random(experts, width, depth)
            ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()

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


def _mla(tokens: int, context: int, fp8: bool) -> Case:
    width, pages = LATENT + KEY, context // PAGE

    def make() -> Ready:
        query, scale = _random(tokens, HEADS, width), 0.05
        page_table = torch.randperm(tokens * pages, device=DEVICE).view(tokens, pages)
        pool, kv_scale = _random(tokens * context, width), 1.0
        if fp8:
            kv_scale = 0.02
            pool = (pool / kv_scale).clamp(-quant.FP8_MAX, quant.FP8_MAX).to(quant.FP8)
        lens = torch.full((tokens,), context, device=DEVICE)
        options = {"page_size": PAGE, "value_dim": LATENT, "scale": scale, "kv_scale": kv_scale}

        def error() -> float:
            got = mla_decode.mla_decode(query, pool, page_table, lens, **options)
            return max(
                relative_error(
                    got[row : row + 1],
                    mla_decode.mla_decode_reference(
                        query[row : row + 1].float(),
                        pool if fp8 else pool.float(),
                        page_table[row : row + 1],
                        lens[row : row + 1],
                        **options,
                    ),
                )
                for row in (0, tokens - 1)
            )

        return Ready(
            ours=lambda: mla_decode.mla_decode(query, pool, page_table, lens, **options),
            error=error,
            peers={"torch (gathers the pages)": lambda: mla_decode.mla_decode_reference(query, pool, page_table, lens, **options)}
            if tokens * context <= 2**19 and not fp8
            else {},
        )

    return Case(
        name=f"mla_decode {'fp8' if fp8 else 'bf16'}",
        size=f"{tokens} x {context}",
        num_bytes=tokens * (context * width * (1 if fp8 else 2) + HEADS * (width + LATENT) * 2),
        num_flops=2 * tokens * HEADS * context * (width + LATENT),
        make=make,
        in_quick=(tokens, context) == (128, 4096),
        target=0.85,
    )


def _weights() -> Case:
    def make() -> Ready:
        quantized, scales = quant.quantize_blocks_reference(_random(8 * 2 * INTERMEDIATE, HIDDEN))

        def ours() -> Tensor:
            return quant.dequantize_blocks(quantized, scales, torch.bfloat16)

        exact = quant.dequantize_blocks_reference(quantized, scales, torch.bfloat16)
        return Ready(
            ours=ours,
            error=lambda: relative_error(ours(), exact),
            peers={"torch": lambda: quant.dequantize_blocks_reference(quantized, scales, torch.bfloat16)},
        )

    elements = 8 * 2 * INTERMEDIATE * HIDDEN
    return Case(name="dequantize_blocks", size="8 experts", num_bytes=3 * elements, make=make, in_quick=True, target=0.85)
