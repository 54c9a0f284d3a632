"""What one step's attention must know of its sequences; derived once per step on the CPU, used by every layer.

Rows of a step: first `num_decode` decode rows (one token per sequence), then the extend rows, sequence after sequence.
Fields of AttentionMetadata declare the axis along which the step may be split in two at a row (the words of overlap/split.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.attention.extend_groups import ExtendGroup, extend_groups
from moesaic.kernels.gpu import upload

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
    """A chunk of prompt: rows [start, start + length) of the step on top of `prefix_len` cached tokens.

    pages int64 [P] hold these prefix_len + length tokens; further ones may follow.
    """

    start: int
    length: int
    prefix_len: int
    pages: Tensor


def _split_num_decode(num_decode: int, cut: int) -> tuple[int, int]:
    first = min(num_decode, cut)
    return first, num_decode - first


def _split_buckets(buckets: tuple[DecodeBucket, ...], cut: int) -> tuple[tuple[DecodeBucket, ...], tuple[DecodeBucket, ...]]:
    """Each bucket's sequences of either side; buckets that one side has nothing of are left out there."""
    halves = [_split_bucket(bucket, cut) for bucket in buckets]
    first, second = (tuple(half[side] for half in halves if len(half[side].seq_lens)) for side in (0, 1))
    return first, second


def _split_bucket(bucket: DecodeBucket, cut: int) -> tuple[DecodeBucket, DecodeBucket]:
    """The padding stays. Named rows are selected by value, for which a device would be waited for (there no bucket names any)."""
    table, lens = bucket.page_table, bucket.seq_lens
    if bucket.rows is None:
        return (
            replace(bucket, page_table=table[:cut], seq_lens=lens[:cut]),
            replace(bucket, page_table=table[cut:], seq_lens=lens[cut:]),
        )
    first = torch.nonzero(bucket.rows < cut).flatten()
    second = torch.nonzero(bucket.rows >= cut).flatten()
    return (
        replace(bucket, rows=bucket.rows[first], page_table=table[first], seq_lens=lens[first]),
        replace(bucket, rows=bucket.rows[second] - cut, page_table=table[second], seq_lens=lens[second]),
    )


def _split_extends(extends: tuple[ExtendSequence, ...], cut: int) -> tuple[tuple[ExtendSequence, ...], tuple[ExtendSequence, ...]]:
    """Sequences of either side. In one that the cut goes through, the first part is the second part's prefix."""
    first, second = [], []
    for sequence in extends:
        before = min(max(cut - sequence.start, 0), sequence.length)
        after = sequence.length - before
        if before:
            first.append(replace(sequence, length=before))
        if after:
            start = max(sequence.start - cut, 0)
            second.append(replace(sequence, start=start, length=after, prefix_len=sequence.prefix_len + before))
    return tuple(first), tuple(second)


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """positions int64 [T] within each sequence; slots int64 [T] in the KV pool for the step's own tokens.

    Split inside a sequence, the second half reads KV rows that the first half writes: in every layer the first half's latent rows
    must be in the pool before the second half attends.
    """

    positions: Tensor = field(metadata={"axis": "rows"})
    slots: Tensor = field(metadata={"axis": "rows"})
    num_decode: int = field(metadata={"axis": _split_num_decode})
    buckets: tuple[DecodeBucket, ...] = field(metadata={"axis": _split_buckets})
    extends: tuple[ExtendSequence, ...] = field(metadata={"axis": _split_extends})

    @cached_property
    def _packed(self) -> dict[int, tuple[ExtendGroup, ...]]:
        return {}

    def extend_groups(self, page_size: int) -> tuple[ExtendGroup, ...]:
        """The extend sequences, packed for pages of this size: by the first layer that asks, for all."""
        if page_size not in self._packed:
            aligned = self.slots.device.type != "cpu"
            self._packed[page_size] = tuple(extend_groups(self.extends, page_size, aligned=aligned))
        return self._packed[page_size]


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


def decode_buckets(
    page_table: Int32Array, seq_lens: Int64Array, page_size: int, device: torch.device, *, one: bool = False
) -> tuple[DecodeBucket, ...]:
    """page_table [B, P] and seq_lens [B] (with the token of this step) -> buckets that cover all B rows once.

    one: a single bucket, whatever the lengths; so it is on a GPU, whose kernel reads no padding.
    """
    if len(seq_lens) == 0:
        return ()
    longest = int(seq_lens.max())
    if one or device.type == "cuda" or longest <= MAX_PADDING * float(seq_lens.mean()) or len(seq_lens) <= 4:
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
        rows=None if rows is None else upload(torch.from_numpy(rows), device),
        page_table=upload(torch.from_numpy(page_table[:, :num_pages].astype(np.int64)), device),
        seq_lens=upload(torch.from_numpy(seq_lens), device),
        page_size=page_size,
    )
