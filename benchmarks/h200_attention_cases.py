"""Cases of benchmarks/h200.py: MLA decode over a paged pool, prefill attention and the merge of its parts.

Sizes and helpers are those of h200_cases.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import h200_cases as base
import torch
from h200_cases import Call, Case, Ready, relative_error
from torch import Tensor

from moesaic.kernels import merge_attention, mla_decode, mla_prefill, quant
from moesaic.kernels.prefill_libraries import WORKSPACE_BYTES, FlashInferPrefill, Prefill, sdpa_prefill

PROMPT = 4096
FINER_SPLIT = mla_decode.SPLIT_TOKENS // 2


def attention_cases() -> list[Case]:
    """In the order in which they run."""
    return [
        *(_mla(tokens, context, fp8) for context in (4096, 1024, 16384) for tokens in (128, 32, 64, 256) for fp8 in (False, True)),
        *(_prefill(tokens) for tokens in (4096, 8192, 16384)),
        *(_merge(tokens) for tokens in (4096, 16384)),
    ]


def _mla(tokens: int, context: int, fp8: bool) -> Case:
    width, pages = base.LATENT + base.KEY, context // base.PAGE

    def make() -> Ready:
        query, scale = base.random(tokens, base.HEADS, width), 0.05
        page_table = torch.randperm(tokens * pages, device=base.DEVICE).view(tokens, pages)
        pool, kv_scale = base.random(tokens * context, width), 1.0
        if fp8:
            kv_scale = 0.02
            pool = (pool / kv_scale).clamp(-quant.FP8_MAX, quant.FP8_MAX).to(quant.FP8)
        lens = torch.full((tokens,), context, device=base.DEVICE)
        options = {"page_size": base.PAGE, "value_dim": base.LATENT, "scale": scale, "kv_scale": kv_scale}

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

        peers: dict[str, Call] = {}
        if base.DEVICE == "cuda":
            peers["tiles of 32 rows"] = lambda: _decode_in_small_tiles(query, pool, page_table, lens, **options)
        if context > FINER_SPLIT:  # 32 sequences of 4096 in whole splits are 64 programs, half of a Hopper's multiprocessors
            peers[f"splits of {FINER_SPLIT}"] = partial(
                mla_decode.mla_decode, query, pool, page_table, lens, split_tokens=FINER_SPLIT, **options
            )
        if not fp8 and find_spec("flashinfer"):
            peers["FlashInfer"] = _flashinfer_decode(query, pool, page_table, lens, scale)
        if not fp8 and tokens * context <= 2**19:
            peers["torch (gathers the pages)"] = lambda: mla_decode.mla_decode_reference(query, pool, page_table, lens, **options)
        return Ready(ours=lambda: mla_decode.mla_decode(query, pool, page_table, lens, **options), error=error, peers=peers)

    return Case(
        name=f"mla_decode {'fp8' if fp8 else 'bf16'}",
        size=f"{tokens} x {context}",
        num_bytes=tokens * (context * width * (1 if fp8 else 2) + base.HEADS * (width + base.LATENT) * 2),
        num_flops=2 * tokens * base.HEADS * context * (width + base.LATENT),
        make=make,
        in_quick=(tokens, context) == (128, 4096),
        target=0.85,
    )


def _decode_in_small_tiles(query: Tensor, pool: Tensor, page_table: Tensor, lens: Tensor, **options: Any) -> Tensor:
    """Our kernel, with smaller tiles that come further ahead of their use: which is faster is to be measured."""
    from moesaic.kernels.triton import mla_decode as device

    tiling = replace(device.tiling_for(query.dtype, pool.dtype, base.HEADS), tokens=32, num_stages=5)
    return device.mla_decode(query, pool, page_table, lens, split_tokens=mla_decode.SPLIT_TOKENS, tiling=tiling, **options)


def _flashinfer_decode(query: Tensor, pool: Tensor, page_table: Tensor, lens: Tensor, scale: float) -> Call:
    """FlashInfer's MLA decode on the same pool, planned by the first call."""

    @cache
    def planned() -> Any:
        import flashinfer

        starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
        pages, sizes = page_table.flatten().int(), (base.HEADS, base.LATENT, base.KEY, base.PAGE)
        wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(torch.empty(WORKSPACE_BYTES, dtype=torch.int8, device=query.device))
        starts_of_pages = starts * page_table.shape[1]
        wrapper.plan(starts, starts_of_pages, pages, lens.int(), *sizes, False, scale, query.dtype, pool.dtype)
        return wrapper

    parts = (base.LATENT, base.KEY)
    arguments = (*query.split(parts, dim=-1), *pool.view(-1, base.PAGE, sum(parts)).split(parts, dim=-1))
    return lambda: planned().run(*arguments)


def _prefill(tokens: int) -> Case:
    """Prompts of 4096 tokens without cached prefixes."""
    prompt = min(PROMPT, tokens)

    def make() -> Ready:
        heads, scale = base.HEADS, 0.07
        query, value = base.random(tokens, heads, base.NOPE + base.KEY), base.random(tokens, heads, base.VALUE)
        key, key_rope = base.random(heads, base.NOPE, tokens), base.random(base.KEY, tokens)
        chunks = torch.tensor([[first, prompt, first, 0] for first in range(0, tokens, prompt)])

        def ours() -> Tensor:
            return mla_prefill.mla_prefill(query, key, key_rope, value, chunks, scale=scale)

        def error() -> float:
            """Of the first and the last rows of the last prompt."""
            few, first = min(64, prompt), tokens - prompt
            spans = torch.tensor([[first, few, first, prompt, 0], [tokens - few, few, first, prompt, prompt - few]])
            exact, _ = mla_prefill.mla_prefill_part_reference(query, key, key_rope, value, spans, scale=scale)
            rows = torch.cat([torch.arange(first, first + few), torch.arange(tokens - few, tokens)])
            return relative_error(ours()[rows], exact[rows])

        whole = torch.cat([key, key_rope.expand(heads, -1, -1)], dim=1)
        parts = tokens // prompt, prompt
        sdpa_query, sdpa_value = (x.view(*parts, heads, -1).transpose(1, 2) for x in (query, value))
        sdpa_key = whole.permute(2, 0, 1).contiguous().view(*parts, heads, -1).transpose(1, 2)

        def sdpa() -> Tensor:
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(sdpa_query, sdpa_key, sdpa_value, is_causal=True, scale=scale)

        # The peers behind our contract, with what it costs to bring keys and rotary parts together, and the bare product.
        behind: dict[str, Prefill] = {"SDPA as a backend": sdpa_prefill}
        if find_spec("flashinfer"):
            behind["FlashInfer as a backend"] = FlashInferPrefill(torch.device(base.DEVICE))
        peers = {name: partial(attend, query, key, key_rope, value, chunks, scale=scale) for name, attend in behind.items()}
        return Ready(ours=ours, error=error, peers={"torch SDPA": sdpa, **peers})

    width = base.NOPE + base.KEY + base.VALUE
    return Case(
        name="mla_prefill",
        size=f"{tokens} tokens in prompts of {prompt}",
        num_bytes=tokens * base.HEADS * (width + base.NOPE + base.VALUE) * 2,
        num_flops=tokens * (prompt + 1) * base.HEADS * width,
        make=make,
        captured=False,
        in_quick=tokens == 4096,
    )


def _merge(tokens: int) -> Case:
    def make() -> Ready:
        parts = [base.random(tokens, base.HEADS, base.VALUE) for _ in range(2)]
        lses = [torch.randn(tokens, base.HEADS, device=base.DEVICE) for _ in range(2)]
        arguments = (parts[0], lses[0], parts[1], lses[1])
        exact, _ = merge_attention.merge_attention_reference(parts[0].float(), lses[0], parts[1].float(), lses[1])
        return Ready(
            ours=lambda: merge_attention.merge_attention(*arguments),
            error=lambda: relative_error(merge_attention.merge_attention(*arguments)[0], exact),
            peers={"torch": lambda: merge_attention.merge_attention_reference(*arguments)},
        )

    return Case(
        name="merge_attention",
        size=f"{tokens} tokens",
        num_bytes=tokens * base.HEADS * (3 * base.VALUE * 2 + 12),
        make=make,
        in_quick=tokens == 4096,
        target=0.85,
    )
