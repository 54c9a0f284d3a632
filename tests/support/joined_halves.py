"""The results of two halves of a batch that were computed apart, in the whole's order: what a split must leave possible."""

from __future__ import annotations

from torch import Tensor


def join_row_ids(first: Tensor, second: Tensor, row_ids: Tensor, cut: int) -> Tensor:
    """Undo the split of "row_ids": results [N0, ...] and [N1, ...] of the halves -> [N, ...] in the order of row_ids [N]."""
    joined = first.new_empty(len(row_ids), *first.shape[1:])
    in_first = row_ids < cut
    joined[in_first] = first
    joined[~in_first] = second
    return joined
