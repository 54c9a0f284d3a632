"""Packing of extend sequences: nothing lost, order kept, memory bounded."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.attention.config import MAX_GROUP_TOKENS
from moesaic.attention.extend_groups import extend_groups
from moesaic.attention.metadata import ExtendSequence
from moesaic.kernels.mla_prefill import CONTEXT_ALIGNMENT


@given(
    spans=st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 3000), st.integers(0, 2)), max_size=8),
    page_size=st.sampled_from([1, 4, 10, 16, 64]),
    aligned=st.booleans(),
    first=st.integers(0, 5),
)
def test_groups_hold_every_chunk_once_in_order_within_the_bound(
    spans: list[tuple[int, int, int]], page_size: int, aligned: bool, first: int
) -> None:
    """Each sequence's pages are numbered on from the one before; some have spare pages that must not be read."""
    extends, start, page = [], first, 0
    for prefix, length, spare in spans:
        num_pages = -(-(prefix + length) // page_size)
        extends.append(
            ExtendSequence(start=start, length=length, prefix_len=prefix, pages=torch.arange(page, page + num_pages + spare))
        )
        start, page = start + length, page + num_pages + spare
    found = []
    for group in extend_groups(tuple(extends), page_size, aligned=aligned):
        assert len(group.pages) * page_size <= MAX_GROUP_TOKENS or len(group.chunks) == 1
        for row, rows, first_key, prefix in group.chunks.tolist():
            context = group.pages[first_key // page_size :][: -(-(prefix + rows) // page_size)]
            found.append((group.start + row, rows, prefix, context.tolist()))
        if aligned and page_size != 10:
            assert not (group.chunks[:, 2] % CONTEXT_ALIGNMENT).any()
        assert group.stop == group.start + sum(group.chunks[:, 1].tolist())
    expected = [
        (each.start, each.length, each.prefix_len, each.pages[: -(-(each.prefix_len + each.length) // page_size)].tolist())
        for each in extends
    ]
    assert found == expected
