"""What one step's attention must know of its sequences; derived once per step on the CPU, used by every layer.

Rows of a step: first `num_decode` decode rows (one token per sequence), then the extend rows, sequence after sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

MAX_PADDING = 1.25
"""Decode sequences share a bucket while the longest is at most this many times the bucket's mean."""


@dataclass(frozen=True, kw_only=True)
class DecodeBucket:
    """Decode sequences of similar length, padded to the longest.

    rows: int64 [b] rows of the step, or None when the bucket is all decode rows in order. page_table int64 [b, P] (0 padded);
    seq_lens int64 [b].
    """

    rows: Tensor | None
    page_table: Tensor
    seq_lens: Tensor
    page_size: int


@dataclass(frozen=True, kw_only=True)
class ExtendSequence:
    """A chunk of prompt: rows [start, start + length) of the step on top of `prefix_len` cached tokens. pages int64 [P]."""

    start: int
    length: int
    prefix_len: int
    pages: Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """positions int64 [T] within each sequence; slots int64 [T] in the KV pool for the step's own tokens."""

    positions: Tensor
    slots: Tensor
    num_decode: int
    buckets: tuple[DecodeBucket, ...]
    extends: tuple[ExtendSequence, ...]


def _bucket_bounds(sorted_lens: Int64Array) -> list[int]:
    """Cut descending lengths where padding to the bucket's longest would waste too much."""
    bounds = [0]
    start = 0
    sums = np.cumsum(sorted_lens)
    while start < len(sorted_lens):
        sizes = np.arange(1, len(sorted_lens) - start + 1)
        means = (sums[start:] - (sums[start - 1] if start else 0)) / sizes
        fits = sorted_lens[start] <= means * MAX_PADDING
        fits[: min(4, len(fits))] = True
        start += int(np.flatnonzero(fits)[-1]) + 1
        bounds.append(start)
    return bounds


def decode_buckets(page_table: Int32Array, seq_lens: Int64Array, page_size: int, device: torch.device) -> tuple[DecodeBucket, ...]:
    """page_table [B, P] and seq_lens [B] (with the token of this step) -> buckets that cover all B rows once."""
    if len(seq_lens) == 0:
        return ()
    longest = int(seq_lens.max())
    if longest <= MAX_PADDING * float(seq_lens.mean()) or len(seq_lens) <= 4:
        return (_bucket(None, page_table, seq_lens, page_size, device),)
    order = np.argsort(-seq_lens, kind="stable")
    bounds = _bucket_bounds(seq_lens[order])
    return tuple(
        _bucket(rows, page_table[rows], seq_lens[rows], page_size, device)
        for rows in (order[first:last] for first, last in pairwise(bounds))
    )


def _bucket(
    rows: Int64Array | None, page_table: Int32Array, seq_lens: Int64Array, page_size: int, device: torch.device
) -> DecodeBucket:
    num_pages = -(-int(seq_lens.max()) // page_size)
    return DecodeBucket(
        rows=None if rows is None else torch.from_numpy(rows).to(device),
        page_table=torch.from_numpy(page_table[:, :num_pages].astype(np.int64)).to(device),
        seq_lens=torch.from_numpy(seq_lens).to(device),
        page_size=page_size,
    )
