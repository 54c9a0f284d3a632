"""Attention over a step's two halves, first then second, gives the whole step's rows, wherever the cut falls."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.attention.backend import KernelBackend
from moesaic.attention.config import MLAConfig
from moesaic.attention.kv_pool import LatentKVPool
from moesaic.attention.metadata import AttentionMetadata, ExtendSequence, decode_buckets
from moesaic.attention.mla import MLAWeights, MultiHeadLatentAttention
from moesaic.kernels.rope import rope_table
from moesaic.kernels.rope_config import RopeConfig
from moesaic.overlap.split import split_batch, split_row, splittable

PAGE, PAGES_PER_SEQUENCE, HIDDEN, CPU = 4, 12, 32, torch.device("cpu")
CONFIG = MLAConfig(
    num_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    kv_lora_rank=16,
    softmax_scale=0.3,
    rms_norm_eps=1e-6,
    fp8_activations=False,
)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


MLA = MultiHeadLatentAttention(
    CONFIG,
    MLAWeights(
        down=_random(2 * 12 + CONFIG.latent_dim, HIDDEN, seed=1),
        q_norm=None,
        q_up=None,
        kv_norm=torch.ones(16),
        kv_up_key=_random(2, 8, 16, seed=2),
        kv_up_value=_random(2, 8, 16, seed=3),
        output=_random(HIDDEN, 16, seed=4),
    ),
    0,
    rope_table(RopeConfig(dim=4, theta=10000.0), 64),
)


@dataclass(frozen=True)
class StepSpec:
    """Cached tokens of each decoding sequence; (cached tokens, new tokens) of each chunk."""

    decode: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()

    @property
    def cached(self) -> list[int]:
        return [*self.decode, *(prefix for prefix, _ in self.chunks)]

    @property
    def num_rows(self) -> int:
        return len(self.decode) + sum(length for _, length in self.chunks)


class World:
    """A pool that holds the cached tokens of a step's sequences, on scattered pages."""

    def __init__(self, spec: StepSpec) -> None:
        num_sequences = len(spec.cached)
        self._spec = spec
        self.pool = LatentKVPool(
            num_layers=1,
            num_pages=num_sequences * PAGES_PER_SEQUENCE,
            page_size=PAGE,
            latent_dim=CONFIG.latent_dim,
            dtype=torch.float32,
            device=CPU,
        )
        shuffled = torch.randperm(self.pool.num_pages, generator=torch.Generator().manual_seed(0))
        self._pages = shuffled.view(num_sequences, PAGES_PER_SEQUENCE)
        for seq, cached in enumerate(spec.cached):
            self.pool.rows(0)[self._slots(seq, 0, cached)] = _random(cached, CONFIG.latent_dim, seed=100 + seq)

    def metadata(self) -> AttentionMetadata:
        spec = self._spec
        num_decode = len(spec.decode)
        spans = [(seq, cached, cached + 1) for seq, cached in enumerate(spec.decode)]
        spans += [(num_decode + i, prefix, prefix + length) for i, (prefix, length) in enumerate(spec.chunks)]
        extends, row = [], num_decode
        for seq, start, stop in spans[num_decode:]:
            pages = self._pages[seq, : -(-stop // PAGE)]
            extends.append(ExtendSequence(start=row, length=stop - start, prefix_len=start, pages=pages))
            row += stop - start
        table = self._pages[:num_decode].numpy().astype(np.int32)
        return AttentionMetadata(
            positions=torch.cat([torch.arange(start, stop) for _, start, stop in spans]),
            slots=torch.cat([self._slots(*span) for span in spans]),
            num_decode=num_decode,
            buckets=decode_buckets(table, np.array(spec.decode, dtype=np.int64) + 1, PAGE, CPU),
            extends=tuple(extends),
        )

    @torch.inference_mode()
    def attend(self, hidden: Tensor, metadata: AttentionMetadata) -> Tensor:
        queries = MLA.prepare(hidden, metadata, self.pool)
        return MLA.output(MLA.core(queries, metadata, self.pool, KernelBackend()))

    def _slots(self, seq: int, start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop)
        return self._pages[seq][positions // PAGE] * PAGE + positions % PAGE


def _check(spec: StepSpec, cut: int) -> None:
    """The same rows and the same pool, from halves over a pool of their own: nothing of the whole step's is there yet."""
    hidden = _random(spec.num_rows, HIDDEN, seed=7) * HIDDEN**0.5
    whole, parted = World(spec), World(spec)
    expected = whole.attend(hidden, whole.metadata())
    first, second = split_batch(parted.metadata(), cut)
    out = [parted.attend(hidden[:cut], first), parted.attend(hidden[cut:], second)]
    assert [len(half) for half in out] == [cut, spec.num_rows - cut]
    torch.testing.assert_close(torch.cat(out), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parted.pool.rows(0), whole.pool.rows(0))


UNEVEN = (2, 40, 3, 41, 1, 2, 39, 3, 2)
SPECS = {
    "decode of like lengths, one bucket": StepSpec(decode=(20, 21, 22, 20, 21, 20)),
    "decode of uneven lengths, several buckets": StepSpec(decode=UNEVEN),
    "chunks without a prefix": StepSpec(chunks=((0, 5), (0, 9), (0, 3))),
    "a chunk on a cached prefix": StepSpec(chunks=((13, 11),)),
    "decode, then chunks on prefixes": StepSpec(decode=(5, 30, 2), chunks=((8, 6), (0, 4), (3, 1))),
    "one token": StepSpec(decode=(6,)),
    "one-token chunk": StepSpec(chunks=((6, 1),)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_halves_give_the_wholes_rows_at_every_cut_empty_sides_too(spec: StepSpec) -> None:
    for cut in range(spec.num_rows + 1):
        _check(spec, cut)


@settings(max_examples=25, deadline=None)
@given(
    decode=st.lists(st.integers(0, 40), max_size=7).map(tuple),
    chunks=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=4).map(tuple),
    threshold=st.sampled_from([0.0, 0.3, 0.48, 0.5]),
)
def test_the_rule_and_the_split_agree_on_any_step(
    decode: tuple[int, ...], chunks: tuple[tuple[int, int], ...], threshold: float
) -> None:
    spec = StepSpec(decode=decode, chunks=chunks)
    cut = split_row(len(decode), [length for _, length in chunks], threshold)
    if cut is not None:
        _check(spec, cut)


def test_uneven_lengths_do_make_several_buckets() -> None:
    """Guards the tests above."""
    assert len(World(SPECS["decode of uneven lengths, several buckets"]).metadata().buckets) > 1


def test_a_bucket_that_one_half_has_nothing_of_is_left_out_there() -> None:
    metadata = World(StepSpec(decode=(30, 37, 30, 30, 30, 1, 2, 1, 2, 1))).metadata()
    assert len(metadata.buckets) == 2
    first, second = split_batch(metadata, 5)
    assert [bucket.seq_lens.tolist() for bucket in first.buckets] == [[38, 31, 31, 31, 31]]
    assert [bucket.seq_lens.tolist() for bucket in second.buckets] == [[3, 3, 2, 2, 2]]
    for half in (first, second):
        (bucket,) = half.buckets
        assert bucket.rows is not None
        assert sorted(bucket.rows.tolist()) == list(range(5))


def test_the_first_part_of_a_cut_sequence_is_the_seconds_prefix() -> None:
    first, second = split_batch(World(StepSpec(decode=(9,), chunks=((8, 6), (2, 5)))).metadata(), 5)
    assert [(e.start, e.length, e.prefix_len) for e in first.extends] == [(1, 4, 8)]
    assert [(e.start, e.length, e.prefix_len) for e in second.extends] == [(0, 2, 12), (2, 5, 2)]
    assert (first.num_decode, second.num_decode) == (1, 0)


def test_the_second_half_of_a_cut_sequence_does_need_the_firsts_kv() -> None:
    """The ordering requirement, seen from its breach: run alone over an empty prefix, the second half's rows differ."""
    spec = StepSpec(chunks=((0, 10),))
    hidden = _random(10, HIDDEN, seed=7) * HIDDEN**0.5
    whole, alone = World(spec), World(spec)
    _, second = split_batch(alone.metadata(), 5)
    assert (alone.attend(hidden[5:], second) - whole.attend(hidden, whole.metadata())[5:]).abs().max() > 1e-3


@dataclass(frozen=True, kw_only=True)
class WiderMetadata(AttentionMetadata):
    added: Tensor


def test_a_new_metadata_field_without_an_axis_fails_the_batch_that_holds_it() -> None:
    with pytest.raises(TypeError, match=r"WiderMetadata.added declares no axis"):

        @splittable
        @dataclass(frozen=True)
        class Batch:
            metadata: WiderMetadata = field(metadata={"axis": "batch"})
