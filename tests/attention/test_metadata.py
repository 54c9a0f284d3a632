"""Decode buckets cover every sequence once, waste a bounded amount of padding, and change no result."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.attention.backend import KernelBackend
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.metadata import MAX_PADDING, AttentionMetadata, DecodeBucket, Int32Array, decode_buckets

PAGE, CPU = 4, torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 90), max_size=24)
MIXED = st.lists(st.sampled_from([1, 2, 3, 30, 31, 88, 90]), min_size=1, max_size=24)


def _page_table(lengths: list[int], seed: int = 0) -> Int32Array:
    """Distinct random pages for every sequence, 0 after its end."""
    counts = [-(-length // PAGE) for length in lengths]
    table = np.zeros((len(lengths), max(counts, default=0)), dtype=np.int32)
    pages = np.random.default_rng(seed).permutation(sum(counts) + 3)
    for row, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        table[row, :count] = pages[end - count : end]
    return table


def _buckets(lengths: list[int]) -> tuple[DecodeBucket, ...]:
    return decode_buckets(_page_table(lengths), np.array(lengths, dtype=np.int64), PAGE, CPU)


def _rows(bucket: DecodeBucket, num_rows: int) -> list[int]:
    return list(range(num_rows)) if bucket.rows is None else bucket.rows.tolist()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS | MIXED)
def test_every_row_lies_in_exactly_one_bucket_with_its_own_pages_and_length(lengths: list[int]) -> None:
    table, buckets = _page_table(lengths), _buckets(lengths)
    assert sorted(row for bucket in buckets for row in _rows(bucket, len(lengths))) == list(range(len(lengths)))
    for bucket in buckets:
        for i, row in enumerate(_rows(bucket, len(lengths))):
            assert int(bucket.seq_lens[i]) == lengths[row]
            own = -(-lengths[row] // PAGE)
            assert bucket.page_table[i, :own].tolist() == table[row, :own].tolist()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS | MIXED)
def test_padding_is_bounded_in_every_bucket_of_more_than_four(lengths: list[int]) -> None:
    for bucket in _buckets(lengths):
        own = [lengths[row] for row in _rows(bucket, len(lengths))]
        assert bucket.page_table.shape[1] == -(-max(own) // PAGE), "no wider than the longest"
        assert len(own) <= 4 or max(own) <= MAX_PADDING * sum(own) / len(own) * (1 + 1e-9)


def test_similar_lengths_stay_together_and_in_order() -> None:
    buckets = _buckets([80, 90, 85, 88, 90, 82])
    assert len(buckets) == 1
    assert buckets[0].rows is None


def test_one_long_sequence_does_not_widen_many_short_ones() -> None:
    lengths = [2] * 12 + [90]
    buckets = _buckets(lengths)
    narrow = [bucket for bucket in buckets if 12 not in _rows(bucket, 13)]
    assert sum(len(bucket.page_table) for bucket in narrow) >= 9
    assert all(bucket.page_table.shape[1] == 1 for bucket in narrow)


def test_no_sequences_need_no_bucket() -> None:
    assert decode_buckets(np.zeros((0, 3), dtype=np.int32), np.zeros(0, dtype=np.int64), PAGE, CPU) == ()


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS.filter(len) | MIXED, seed=st.integers(0, 2**31))
def test_decode_over_buckets_equals_each_sequence_alone_in_float64(lengths: list[int], seed: int) -> None:
    heads, rank, rope = 2, 6, 2
    generator = torch.Generator().manual_seed(seed)
    table = _page_table(lengths, seed)
    num_pages = sum(-(-length // PAGE) for length in lengths) + 3
    pool = LatentKVPool(num_layers=1, num_pages=num_pages, page_size=PAGE, latent_dim=rank + rope, dtype=torch.float32, device=CPU)
    rows = torch.randn(num_pages * PAGE, rank + rope, generator=generator)
    pool.rows(0)[: len(rows)].copy_(rows)
    query = torch.randn(len(lengths), heads, rank + rope, generator=generator)
    metadata = AttentionMetadata(
        positions=torch.tensor(lengths) - 1,
        slots=torch.empty(0, dtype=torch.long),
        num_decode=len(lengths),
        buckets=decode_buckets(table, np.array(lengths, dtype=np.int64), PAGE, CPU),
        extends=(),
    )
    out = KernelBackend().decode(query, pool, 0, metadata, value_dim=rank, scale=0.35)
    for row, length in enumerate(lengths):
        slots = torch.from_numpy(table[row].astype(np.int64)).unsqueeze(1) * PAGE + torch.arange(PAGE)
        latent = rows[slots.flatten()[:length]].double()
        weights = (query[row].double() @ latent.t() * 0.35).softmax(-1)
        torch.testing.assert_close(out[row].double(), weights @ latent[:, :rank], rtol=1e-4, atol=1e-5)
