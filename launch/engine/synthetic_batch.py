"""Batches like those of real steps, without requests: what the calibration of two-batch overlap and benchmarks time.

Their KV lies in the first pages of the pool, which no sequence holds while a rank starts; nothing is registered anywhere. Knows no
ranks and no scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moesaic.attention.metadata import AttentionMetadata, ExtendSequence, Int64Array, decode_buckets

DECODE_CONTEXT_TOKENS = 512
PROMPT_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class PoolShape:
    """The KV pool that the batches lie in, and the longest sequence it may hold, in tokens."""

    num_pages: int
    page_size: int
    context_length: int


@dataclass(frozen=True, kw_only=True)
class SyntheticBatch:
    """input_ids int64 [T]; logit_rows int64 [N]: the last row of each sequence.

    num_decode rows decode one token each; chunk_lengths: rows of each prompt after them.
    """

    input_ids: Tensor
    metadata: AttentionMetadata
    logit_rows: Tensor
    num_decode: int
    chunk_lengths: tuple[int, ...]


def decode_batch(
    num_tokens: int, input_ids: Tensor, pool: PoolShape, *, context_tokens: int = DECODE_CONTEXT_TOKENS
) -> SyntheticBatch:
    """So many sequences that decode a token each, with `context_tokens` of context or what the pool has for each."""
    size = pool.page_size
    pages_each = max(1, min(pool.num_pages // num_tokens, -(-context_tokens // size), pool.context_length // size))
    position = min(context_tokens, pool.context_length, pages_each * size) - 1
    # A pool of fewer pages than sequences can't happen in service; here they would just share some.
    page_table = (np.arange(num_tokens * pages_each, dtype=np.int32) % pool.num_pages).reshape(num_tokens, pages_each)
    slots = page_table[:, position // size].astype(np.int64) * size + position % size
    device = input_ids.device
    return SyntheticBatch(
        input_ids=input_ids,
        metadata=AttentionMetadata(
            positions=torch.full((num_tokens,), position, device=device),
            slots=torch.from_numpy(slots).to(device),
            num_decode=num_tokens,
            buckets=decode_buckets(page_table, np.full(num_tokens, position + 1), size, device),
            extends=(),
        ),
        logit_rows=torch.arange(num_tokens, device=device),
        num_decode=num_tokens,
        chunk_lengths=(),
    )


def prefill_batch(
    num_tokens: int, input_ids: Tensor, pool: PoolShape, *, prompt_tokens: int = PROMPT_TOKENS, least_prompts: int = 2
) -> SyntheticBatch:
    """Whole prompts of equal length, `least_prompts` at least, of `prompt_tokens` at most, with nothing cached."""
    longest = min(prompt_tokens, pool.context_length)
    lengths = _equal_parts(num_tokens, max(least_prompts, -(-num_tokens // longest)))
    device = input_ids.device
    positions, slots, extends = [], [], []
    start = first_page = 0
    for length in lengths:
        num_pages = -(-length // pool.page_size)
        pages = np.arange(first_page, first_page + num_pages) % pool.num_pages
        at = np.arange(length)
        positions.append(at)
        slots.append(pages[at // pool.page_size] * pool.page_size + at % pool.page_size)
        extends.append(ExtendSequence(start=start, length=length, prefix_len=0, pages=torch.from_numpy(pages).to(device)))
        start, first_page = start + length, first_page + num_pages
    return SyntheticBatch(
        input_ids=input_ids,
        metadata=AttentionMetadata(
            positions=_tensor(positions, device),
            slots=_tensor(slots, device),
            num_decode=0,
            buckets=(),
            extends=tuple(extends),
        ),
        logit_rows=torch.tensor(lengths, device=device).cumsum(0) - 1,
        num_decode=0,
        chunk_lengths=tuple(lengths),
    )


def _equal_parts(total: int, parts: int) -> list[int]:
    """Larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def _tensor(parts: list[Int64Array], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device)
