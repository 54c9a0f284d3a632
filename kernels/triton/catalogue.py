"""Every Triton kernel at the shapes DeepSeek-V3 gives it, as launches that never run: what compile.py compiles for Hopper.

Tensors are on torch's meta device: shapes, dtypes and strides without memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.balanced_choice import BalancedTable, ChoiceCounts
from moesaic.kernels.peer_exchange import Dispatched, PeerLayout, PeerWindow
from moesaic.kernels.permute import RowMap
from moesaic.kernels.quant import FP8
from moesaic.kernels.replica_choice import ReplicaTable
from moesaic.kernels.triton import (
    activation,
    balanced_choice,
    embedding,
    grouped_gemm,
    merge_attention,
    mla_decode,
    mla_prefill,
    norm,
    peer_exchange,
    permute,
    quant,
    rope,
    sampling,
    topk,
)
from moesaic.kernels.triton.launch import Launch, recorded

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOPK = 128, 7168, 2048, 256, 8
LOCAL_EXPERTS, MASKED_ROWS, VOCABULARY = 9, 1024, 129280
BF16, F32, I64 = torch.bfloat16, torch.float32, torch.int64


def _meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def catalogue() -> dict[str, Launch]:
    """Launches by name: the entry's own, and the kernel's where an entry starts several."""
    found: dict[str, Launch] = {}
    entries: dict[str, Callable[[], object]] = {}
    for part in (_quantisation, _rows, _routing, _balancing, _exchange, _peers, _products, _attention, _prefill, _tokens):
        entries |= part()
    for name, call in entries.items():
        with recorded() as launches:
            call()
        assert launches, f"{name} started no kernel"
        for one in launches:
            label = name if len(launches) == 1 else f"{name} {one.kernel.__name__.strip('_').removesuffix('_kernel')}"
            label = label if label not in found else f"{label} 2"
            assert label not in found, f"three launches are called {label}"
            found[label] = one
    return found


def _quantisation() -> dict[str, Callable[[], object]]:
    x, fp8 = _meta(TOKENS, HIDDEN), _meta(TOKENS, HIDDEN, dtype=FP8)
    scales = _meta(TOKENS, HIDDEN // 128, dtype=F32)
    weight, blocks = _meta(INTERMEDIATE, HIDDEN, dtype=FP8), _meta(INTERMEDIATE // 128, HIDDEN // 128, dtype=F32)
    return {
        "quantize_per_token": lambda: quant.quantize_per_token(x, mn_major_scales=True),
        "quantize_per_token row-major": lambda: quant.quantize_per_token(x),
        "dequantize_per_token": lambda: quant.dequantize_per_token(fp8, scales, BF16),
        "quantize_blocks": lambda: quant.quantize_blocks(_meta(INTERMEDIATE, HIDDEN)),
        "dequantize_blocks": lambda: quant.dequantize_blocks(weight, blocks, BF16),
    }


def _rows() -> dict[str, Callable[[], object]]:
    x, gamma, queries = _meta(TOKENS, HIDDEN), _meta(HIDDEN), _meta(TOKENS, 2112)[:, :1536]
    gate_up, counts = _meta(TOKENS, 2 * INTERMEDIATE), _meta(LOCAL_EXPERTS, dtype=I64)
    masked, row_expert = _meta(LOCAL_EXPERTS, MASKED_ROWS, 2 * INTERMEDIATE), _meta(TOKENS, dtype=torch.int32)
    return {
        "swiglu": lambda: activation.swiglu(gate_up),
        "swiglu_quantize": lambda: activation.swiglu_quantize(gate_up, row_expert=row_expert, mn_major_scales=True),
        "swiglu_quantize dense": lambda: activation.swiglu_quantize(_meta(TOKENS, 36864), mn_major_scales=True),
        "swiglu_quantize_masked": lambda: activation.swiglu_quantize_masked(masked, counts, mn_major_scales=True),
        "rms_norm": lambda: norm.rms_norm(x, gamma, 1e-6),
        "rms_norm 512": lambda: norm.rms_norm(_meta(TOKENS, 512), _meta(512), 1e-6),
        "add_rms_norm": lambda: norm.add_rms_norm(x, x, gamma, 1e-6),
        "rms_norm_quantize": lambda: norm.rms_norm_quantize(x, gamma, 1e-6, mn_major_scales=True),
        "rms_norm_quantize 1536": lambda: norm.rms_norm_quantize(queries, _meta(1536), 1e-6, mn_major_scales=True),
        "add_rms_norm_quantize": lambda: norm.add_rms_norm_quantize(x, x, gamma, 1e-6, mn_major_scales=True),
    }


def _routing() -> dict[str, Callable[[], object]]:
    logits, bias, ids = _meta(TOKENS, EXPERTS, dtype=F32), _meta(EXPERTS, dtype=F32), _meta(TOKENS, TOPK, dtype=I64)
    slots, num_replicas = _meta(EXPERTS, 4, dtype=I64), _meta(EXPERTS, dtype=I64)
    static = ReplicaTable(slots=slots, num_replicas=num_replicas)
    dynamic = ReplicaTable(slots=slots, num_replicas=num_replicas, step=_meta(1, dtype=I64))
    options: dict[str, Any] = {"num_groups": 8, "topk_groups": 4, "topk": TOPK, "normalize": True, "scaling_factor": 2.5}
    return {
        "grouped_topk": lambda: topk.grouped_topk(logits, bias, **options),
        "grouped_topk_slots static": lambda: topk.grouped_topk_slots(logits, bias, static, **options),
        "grouped_topk_slots dynamic": lambda: topk.grouped_topk_slots(logits, bias, dynamic, **options),
        "choose_replicas": lambda: topk.choose_replicas(ids, dynamic),
    }


def _balancing() -> dict[str, Callable[[], object]]:
    """256 experts with 32 redundant slots, over 32 and 72 GPUs, with the tables of moe/balanced_choice.py."""
    ids, counts = _meta(TOKENS, TOPK, dtype=I64), _meta(EXPERTS, dtype=I64)
    own = ChoiceCounts(total=counts, before=_meta(TOKENS * TOPK // balanced_choice.CHUNK, EXPERTS, dtype=torch.int32))
    found: dict[str, Callable[[], object]] = {"count_choices": lambda: balanced_choice.count_choices(ids, EXPERTS)}
    for gpus, most, by_activated in ((32, 8, False), (72, 8, False), (72, 8, True)):
        shapes = ((gpus, (EXPERTS + 32) // gpus), (32,), (32, most), (32, most), (EXPERTS,), (EXPERTS,))
        fixed, shared, shared_gpus, shared_slots, index, first = (_meta(*shape, dtype=torch.int32) for shape in shapes)
        table = BalancedTable(
            fixed_experts=fixed,
            shared_experts=shared,
            shared_gpus=shared_gpus,
            shared_slots=shared_slots,
            shared_index=index,
            first_slots=first,
        )
        everyones = _meta(gpus, EXPERTS, dtype=I64)
        name = f"choose_{'activated' if by_activated else 'balanced'} {gpus}"
        call = partial(balanced_choice.choose_balanced, ids, own, everyones, table, rank=0, by_activated=by_activated)
        found[name] = call
    return found


def _exchange() -> dict[str, Callable[[], object]]:
    ids, row = _meta(TOKENS, TOPK, dtype=I64), _meta(TOKENS, TOPK, dtype=I64)
    row_map = RowMap(
        row=row,
        elsewhere=_meta(TOKENS, TOPK, dtype=torch.bool),
        counts=_meta(LOCAL_EXPERTS, dtype=I64),
        num_rows=LOCAL_EXPERTS * MASKED_ROWS,
        tokens=row,
        targets=row,
    )
    rows, weights = _meta(row_map.num_rows, HIDDEN), _meta(TOKENS, TOPK, dtype=F32)
    return {
        "masked_map": lambda: permute.masked_map(ids, LOCAL_EXPERTS, MASKED_ROWS),
        "aligned map": lambda: permute.map_choices("contiguous_map", ids, EXPERTS, alignment=128),
        "to_rows": lambda: permute.to_rows(_meta(TOKENS, HIDDEN), row_map, zero_padding=False),
        "from_rows": lambda: permute.from_rows(rows, row_map),
        "weighted_rows": lambda: permute.weighted_rows(rows, row_map, weights),
    }


def _peers() -> dict[str, Callable[[], object]]:
    """Eight ranks of a node, 32 experts each."""
    layout = PeerLayout(num_ranks=8, num_local=EXPERTS // 8, max_tokens=TOKENS, topk=TOPK, hidden=HIDDEN)
    words = _meta(3, dtype=torch.int32)
    own, peers = _meta(layout.num_bytes, dtype=torch.uint8), _meta(layout.num_ranks, dtype=I64)
    window = PeerWindow(layout=layout, rank=0, own=own, peers=peers, step=words[:1], late=words[1:])
    ids, rows = _meta(TOKENS, TOPK, dtype=I64), _meta(layout.num_local, layout.room, HIDDEN)
    received = Dispatched(
        x=rows,
        scales=rows,
        counts=_meta(layout.num_local, dtype=I64),
        origin=_meta(layout.num_local, layout.room, dtype=torch.int32),
    )
    return {
        "peer dispatch_send": lambda: peer_exchange.dispatch_send(_meta(TOKENS, HIDDEN), ids, window),
        "peer dispatch_receive": lambda: peer_exchange.dispatch_receive(window),
        "peer combine_send": lambda: peer_exchange.combine_send(rows, received, window),
        "peer combine_receive": lambda: peer_exchange.combine_receive(ids, _meta(TOKENS, TOPK, dtype=F32), window),
    }


def _products() -> dict[str, Callable[[], object]]:
    """Gate and up of the routed experts, [4096, 7168], and dense: a decode step's first projection, a chunk's dense layer."""
    width, counts = 2 * INTERMEDIATE, _meta(LOCAL_EXPERTS, dtype=I64)
    weight, weight8 = _meta(LOCAL_EXPERTS, width, HIDDEN), _meta(LOCAL_EXPERTS, width, HIDDEN, dtype=FP8)
    turned = _meta(LOCAL_EXPERTS, HIDDEN, width).transpose(1, 2)
    scales = _meta(LOCAL_EXPERTS, width // 128, HIDDEN // 128, dtype=F32)
    x, x8 = _meta(LOCAL_EXPERTS, MASKED_ROWS, HIDDEN), _meta(LOCAL_EXPERTS, MASKED_ROWS, HIDDEN, dtype=FP8)
    own = _meta(LOCAL_EXPERTS, HIDDEN // 128, MASKED_ROWS, dtype=F32).transpose(1, 2)
    found: dict[str, Callable[[], object]] = {}
    for rows in (64, 128):
        found[f"grouped_gemm_fp8_masked {rows}"] = partial(
            grouped_gemm.grouped_gemm_fp8_masked, x8, own, weight8, scales, counts, expected_rows=rows, out_dtype=BF16
        )
        found[f"grouped_gemm_masked {rows}"] = partial(grouped_gemm.grouped_gemm_masked, x, weight, counts, expected_rows=rows)
    for rows, columns in ((TOKENS // 2, 2112), (MASKED_ROWS, 36864)):
        blocks = _meta(-(-columns // 128), HIDDEN // 128, dtype=F32)
        dense = (x8[0, :rows], own[0, :rows], _meta(columns, HIDDEN, dtype=FP8), blocks)
        found[f"fp8_gemm {rows}"] = partial(grouped_gemm.fp8_gemm, *dense, out_dtype=BF16)
    lists = [MASKED_ROWS] + [0] * (LOCAL_EXPERTS - 1)
    return found | {
        "grouped_gemm_fp8_contiguous": lambda: grouped_gemm.grouped_gemm_fp8_contiguous(
            x8[0], own[0], weight8, scales, lists, out_dtype=BF16
        ),
        "grouped_gemm_contiguous": lambda: grouped_gemm.grouped_gemm_contiguous(x[0], weight, lists),
        "grouped_gemm_contiguous out-fastest": lambda: grouped_gemm.grouped_gemm_contiguous(x[0], turned, lists),
    }


def _attention() -> dict[str, Callable[[], object]]:
    heads, latent, key, pages = 128, 512, 64, 256
    query, lens = _meta(TOKENS, heads, latent + key), _meta(TOKENS, dtype=I64)
    table, positions = _meta(4096, key // 2, dtype=torch.complex64), _meta(TOKENS, dtype=I64)
    found: dict[str, Callable[[], object]] = {"apply_rope": lambda: rope.apply_rope(_meta(TOKENS, heads, key), table, positions)}
    for name, dtype in (("bf16", BF16), ("fp8", FP8)):
        pool = _meta(64 * 4096, latent + key, dtype=dtype)
        new = _meta(TOKENS, latent + key)
        found[f"write_latent {name}"] = partial(
            rope.write_latent, new, _meta(latent), 1e-6, table=table, positions=positions, slots=positions, pool_rows=pool
        )
        for page in (64, 1):
            pages_of = _meta(TOKENS, pages * 64 // page, dtype=I64)
            sizes: dict[str, Any] = {"page_size": page, "value_dim": latent, "scale": 0.1, "split_tokens": 4096}
            found[f"mla_decode {name} page {page}"] = partial(mla_decode.mla_decode, query, pool, pages_of, lens, **sizes)
    return found


def _prefill() -> dict[str, Callable[[], object]]:
    heads, nope, key, value = 128, 128, 64, 128
    query, values = _meta(TOKENS, heads, nope + key), _meta(TOKENS, heads, value)
    keys, shared_keys = _meta(heads, nope, TOKENS + 16)[:, :, :TOKENS], _meta(key, TOKENS + 16)[:, :TOKENS]
    chunks, unaligned = torch.tensor([[0, TOKENS, 0, 0]]), torch.tensor([[1, TOKENS - 1, 1, 0]])
    spans = torch.tensor([[0, TOKENS, 0, TOKENS, 0]])
    lse = _meta(TOKENS, heads, dtype=F32)
    return {
        "mla_prefill": lambda: mla_prefill.mla_prefill(query, keys, shared_keys, values, chunks, scale=0.1),
        "mla_prefill unaligned": lambda: mla_prefill.mla_prefill(query, keys, shared_keys, values, unaligned, scale=0.1),
        "mla_prefill_part": lambda: mla_prefill.mla_prefill_part(query, keys, shared_keys, values, spans, scale=0.1),
        "merge_attention": lambda: merge_attention.merge_attention(values, lse, values, lse),
    }


def _tokens() -> dict[str, Callable[[], object]]:
    logits, ids = _meta(TOKENS, VOCABULARY), _meta(TOKENS, dtype=I64)
    return {
        "embed": lambda: embedding.embed(ids, _meta(VOCABULARY, HIDDEN)),
        "greedy_tokens": lambda: sampling.greedy_tokens(logits),
        "sample_tokens": lambda: sampling.sample_tokens(logits, _meta(TOKENS, dtype=F32), ids, ids),
    }
