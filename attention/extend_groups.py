"""Chunks of prompt, packed: sequences whose contexts are expanded together, so that short prompts don't cost a call each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moesaic.attention.config import MAX_GROUP_TOKENS
from moesaic.kernels.mla_prefill import CONTEXT_ALIGNMENT

if TYPE_CHECKING:
    from moesaic.attention.metadata import ExtendSequence


@dataclass(frozen=True, kw_only=True)
class ExtendGroup:
    """Rows [start, stop) of a step. pages int64 [P]: the pages of all contexts, one context after the other; `aligned`, a context's
    last page may follow again, so that the next context begins at a multiple of CONTEXT_ALIGNMENT rows (not for odd page sizes).

    chunks int64 [S, 4] on the CPU, as in `kernels.mla_prefill`; query rows count from `start`.
    """

    start: int
    stop: int
    pages: Tensor
    chunks: Tensor


def extend_groups(extends: tuple[ExtendSequence, ...], page_size: int, *, aligned: bool) -> Iterator[ExtendGroup]:
    """A step's extend sequences, in order. A context longer than MAX_GROUP_TOKENS is a group of its own."""
    group: list[ExtendSequence] = []
    num_tokens, step = 0, CONTEXT_ALIGNMENT // page_size if aligned and CONTEXT_ALIGNMENT % page_size == 0 else 1
    for sequence in extends:
        context = _num_pages(sequence, page_size, step) * page_size
        if group and num_tokens + context > MAX_GROUP_TOKENS:
            yield _pack(group, page_size, step)
            group, num_tokens = [], 0
        group.append(sequence)
        num_tokens += context
    if group:
        yield _pack(group, page_size, step)


def _pack(sequences: list[ExtendSequence], page_size: int, step: int) -> ExtendGroup:
    """Contexts begin at multiples of `step` pages."""
    start, last = sequences[0].start, sequences[-1]
    chunks, pages, num_pages = [], [], 0
    for sequence in sequences:
        chunks.append((sequence.start - start, sequence.length, num_pages * page_size, sequence.prefix_len))
        own, room = (_num_pages(sequence, page_size, multiple) for multiple in (1, step))
        pages.append(sequence.pages[:own])
        if room > own and sequence is not last:
            pages.append(sequence.pages[own - 1 : own].expand(room - own))
        num_pages += room
    return ExtendGroup(start=start, stop=last.start + last.length, pages=torch.cat(pages), chunks=torch.tensor(chunks))


def _num_pages(sequence: ExtendSequence, page_size: int, step: int) -> int:
    """A multiple of `step`."""
    return -(-(sequence.prefix_len + sequence.length) // (page_size * step)) * step
