"""Chunks of prompt, packed: sequences whose contexts are expanded together, so that short prompts don't cost a call each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moesaic.attention.config import MAX_GROUP_TOKENS

if TYPE_CHECKING:
    from moesaic.attention.metadata import ExtendSequence


@dataclass(frozen=True, kw_only=True)
class ExtendGroup:
    """Rows [start, stop) of a step. pages int64 [P]: the pages of all contexts, one context after the other.

    chunks int64 [S, 4] on the CPU, as in `kernels.mla_prefill`; query rows count from `start`.
    """

    start: int
    stop: int
    pages: Tensor
    chunks: Tensor


def extend_groups(extends: tuple[ExtendSequence, ...], page_size: int) -> Iterator[ExtendGroup]:
    """A step's extend sequences, in order. A context longer than MAX_GROUP_TOKENS is a group of its own."""
    group: list[ExtendSequence] = []
    num_tokens = 0
    for sequence in extends:
        context = _num_pages(sequence, page_size) * page_size
        if group and num_tokens + context > MAX_GROUP_TOKENS:
            yield _pack(group, page_size)
            group, num_tokens = [], 0
        group.append(sequence)
        num_tokens += context
    if group:
        yield _pack(group, page_size)


def _pack(sequences: list[ExtendSequence], page_size: int) -> ExtendGroup:
    start, last = sequences[0].start, sequences[-1]
    chunks, pages, num_pages = [], [], 0
    for sequence in sequences:
        chunks.append((sequence.start - start, sequence.length, num_pages * page_size, sequence.prefix_len))
        own = _num_pages(sequence, page_size)
        pages.append(sequence.pages[:own])
        num_pages += own
    return ExtendGroup(start=start, stop=last.start + last.length, pages=torch.cat(pages), chunks=torch.tensor(chunks))


def _num_pages(sequence: ExtendSequence, page_size: int) -> int:
    return -(-(sequence.prefix_len + sequence.length) // page_size)
