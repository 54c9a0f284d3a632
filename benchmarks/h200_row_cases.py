"""Cases of benchmarks/h200.py that take tokens one by one: quantisation, norm, SwiGLU, gate, rotation, KV write, permutation.

Sizes and helpers are those of h200_cases.py.
"""

from __future__ import annotations

import h200_cases as base
import torch
from h200_cases import Case, Ready, relative_error
from torch import Tensor

from moesaic.kernels import activation, latent_write, norm, permute, quant, replica_choice, rope, topk


def row_cases() -> list[Case]:
    """In the order in which they run."""
    return [case for tokens in (128, 32, 64, 256, 4096, 8192, 16384) for case in _row_cases(tokens)]


def _row_cases(tokens: int) -> list[Case]:
    in_quick, size = tokens in {128, 4096}, f"{tokens} tokens"
    elements, scale_bytes = tokens * base.HIDDEN, tokens * base.HIDDEN // 128 * 4

    def quantisation() -> Ready:
        x = base.random(tokens, base.HIDDEN)

        def by_torch() -> tuple[Tensor, ...]:
            return quant.quantize_per_token_reference(x)

        return Ready(
            ours=lambda: quant.quantize_per_token(x, mn_major_scales=True),
            error=lambda: base.fp8_error(quant.quantize_per_token(x), x),
            peers={"torch": by_torch, **base.compiled(by_torch, wanted=in_quick)},
        )

    def norms() -> Ready:
        x, residual, gamma = base.random(tokens, base.HIDDEN), base.random(tokens, base.HIDDEN), base.random(base.HIDDEN)
        exact = norm.rms_norm_reference((x + residual).float(), gamma.float(), 1e-6)

        def chain() -> tuple[Tensor, ...]:
            normed, total = norm.add_rms_norm(x, residual, gamma, 1e-6)
            return (*quant.quantize_per_token(normed, mn_major_scales=True), total)

        def by_torch() -> tuple[Tensor, ...]:
            return norm.add_rms_norm_quantize_reference(x, residual, gamma, 1e-6)

        def ours() -> tuple[Tensor, ...]:
            return norm.add_rms_norm_quantize(x, residual, gamma, 1e-6, mn_major_scales=True)

        peers = {"unfused": chain, "torch": by_torch, **base.compiled(by_torch, wanted=in_quick)}
        return Ready(ours=ours, error=lambda: base.fp8_error(ours(), exact), peers=peers)

    def swiglu() -> Ready:
        gate_up = base.random(tokens * base.TOPK, 2 * base.INTERMEDIATE)

        def chain() -> tuple[Tensor, ...]:
            return quant.quantize_per_token(activation.swiglu(gate_up), mn_major_scales=True)

        def by_torch() -> tuple[Tensor, ...]:
            return activation.swiglu_quantize_reference(gate_up)

        return Ready(
            ours=lambda: activation.swiglu_quantize(gate_up, mn_major_scales=True),
            error=lambda: base.fp8_error(activation.swiglu_quantize(gate_up), activation.swiglu_reference(gate_up.float())),
            peers={"unfused": chain, "torch": by_torch, **base.compiled(by_torch, wanted=in_quick)},
        )

    inner = tokens * base.TOPK * base.INTERMEDIATE
    big = 0.85 if tokens >= 4096 else None
    memory = {"in_quick": in_quick, "target": big, "tolerance": 0.04}
    return [
        Case(name="quantize_per_token", size=size, num_bytes=3 * elements + scale_bytes, make=quantisation, **memory),
        Case(name="add_rms_norm_quantize", size=size, num_bytes=7 * elements + scale_bytes, make=norms, **memory),
        Case(name="swiglu_quantize", size=f"{tokens * base.TOPK} rows", num_bytes=5 * inner + inner // 32, make=swiglu, **memory),
        _gate(tokens, in_quick),
        *_latent(tokens, in_quick),
        *_exchange(tokens, in_quick),
    ]


def _gate(tokens: int, in_quick: bool) -> Case:
    def make() -> Ready:
        logits = torch.randn(tokens, base.EXPERTS, device=base.DEVICE)
        bias = torch.randn(base.EXPERTS, device=base.DEVICE) * 0.1
        table = replica_choice.ReplicaTable(
            slots=torch.arange(base.EXPERTS * 2, device=base.DEVICE).view(base.EXPERTS, 2),
            num_replicas=torch.randint(1, 3, (base.EXPERTS,), device=base.DEVICE),
            step=torch.zeros(1, dtype=torch.int64, device=base.DEVICE),
        )
        options = {
            "num_groups": base.GROUPS,
            "topk_groups": base.TOPK_GROUPS,
            "topk": base.TOPK,
            "normalize": True,
            "scaling_factor": 2.5,
        }

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

        return Ready(ours=ours, error=error, peers={"torch": by_torch, **base.compiled(by_torch, wanted=in_quick)})

    num_bytes = tokens * (base.EXPERTS * 4 + base.TOPK * 20)
    target_us = 12.0 if tokens <= 256 else None
    return Case(
        name="grouped_topk_slots", size=f"{tokens} tokens", num_bytes=num_bytes, make=make, in_quick=in_quick, target_us=target_us
    )


def _latent(tokens: int, in_quick: bool) -> list[Case]:
    def rotation() -> tuple[Tensor, Tensor]:
        table = rope.rope_table(rope.RopeConfig(dim=base.KEY, theta=10000.0), 16384).to(base.DEVICE)
        return table, torch.randint(0, 16384, (tokens,), device=base.DEVICE)

    def rotate() -> Ready:
        table, positions = rotation()
        x = base.random(tokens, base.HEADS, base.KEY)
        exact = rope.apply_rope_reference(x.float(), table, positions)
        return Ready(
            ours=lambda: rope.apply_rope(x, table, positions),
            error=lambda: relative_error(rope.apply_rope(x.clone(), table, positions), exact),
            repeats=False,
            peers={"torch": lambda: rope.apply_rope_reference(x, table, positions)},
        )

    def write(dtype: torch.dtype) -> Ready:
        table, positions = rotation()
        projected, gamma = base.random(tokens, base.LATENT + base.KEY), base.random(base.LATENT)
        slots = torch.randperm(4 * tokens, device=base.DEVICE)[:tokens]
        pool = torch.zeros(4 * tokens, base.LATENT + base.KEY, device=base.DEVICE).to(dtype)
        options = {"table": table, "positions": positions, "slots": slots}

        def ours() -> Tensor:
            latent_write.write_latent(projected, gamma, 1e-6, pool_rows=pool, kv_scale=scale, **options)
            return pool

        def by_torch() -> Tensor:
            latent_write.write_latent_reference(projected, gamma, 1e-6, pool_rows=pool, kv_scale=scale, **options)
            return pool

        def error() -> float:
            exact = torch.zeros(pool.shape, device=base.DEVICE)
            latent_write.write_latent_reference(projected.float(), gamma.float(), 1e-6, pool_rows=exact, **options)
            return relative_error(ours()[slots].float() * scale, exact[slots])

        scale = 0.05 if dtype is quant.FP8 else 1.0
        return Ready(ours=ours, error=error, peers={"torch": by_torch})

    width, size = base.LATENT + base.KEY, f"{tokens} tokens"
    return [
        Case(
            name="apply_rope",
            size=size,
            num_bytes=tokens * (base.HEADS * base.KEY * 4 + base.KEY * 4),
            make=rotate,
            in_quick=in_quick,
        ),
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
    rows = tokens * base.TOPK

    def choices() -> Tensor:
        return torch.rand(tokens, base.EXPERTS, device=base.DEVICE).topk(base.TOPK, dim=-1).indices

    def layout() -> Ready:
        ids = choices()
        expected = permute.masked_map_reference(ids, base.EXPERTS, tokens)
        return Ready(
            ours=lambda: permute.masked_map(ids, base.EXPERTS, tokens).row,
            error=lambda: float((permute.masked_map(ids, base.EXPERTS, tokens).row != expected.row).any()),
            peers={"torch": lambda: permute.masked_map_reference(ids, base.EXPERTS, tokens).row},
        )

    def spread() -> Ready:
        row_map, _ = permute.contiguous_map(choices(), base.EXPERTS, 1)
        hidden = base.random(tokens, base.HIDDEN)
        return Ready(
            ours=lambda: permute.to_rows(hidden, row_map, zero_padding=False),
            error=lambda: relative_error(permute.to_rows(hidden, row_map), permute.to_rows_reference(hidden, row_map)),
            peers={"torch": lambda: permute.to_rows_reference(hidden, row_map)},
        )

    def combine() -> Ready:
        row_map, _ = permute.contiguous_map(choices(), base.EXPERTS, 1)
        expert_rows, weights = base.random(rows, base.HIDDEN), torch.rand(tokens, base.TOPK, device=base.DEVICE)

        def by_torch() -> Tensor:
            return permute.weighted_sum(permute.from_rows_reference(expert_rows, row_map), weights)

        return Ready(
            ours=lambda: permute.weighted_rows(expert_rows, row_map, weights),
            error=lambda: relative_error(permute.weighted_rows(expert_rows, row_map, weights), by_torch()),
            peers={"torch": by_torch},
        )

    moved = (tokens + rows) * base.HIDDEN * 2
    size, target = f"{tokens} tokens", 0.85 if tokens >= 4096 else None
    return [
        Case(name="masked_map", size=size, num_bytes=rows * 25, make=layout, tolerance=0.0, in_quick=in_quick),
        Case(name="to_rows", size=size, num_bytes=moved, make=spread, tolerance=0.0, in_quick=in_quick, target=target),
        Case(name="weighted_rows", size=size, num_bytes=moved, make=combine, in_quick=in_quick, target=target),
    ]
