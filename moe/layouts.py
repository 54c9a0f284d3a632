"""Received tokens to one of the two expert layouts, and expert outputs back to received tokens; shared by all CPU backends."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic.kernels.permute import RowMap, contiguous_map, from_rows, masked_map, to_rows, weighted_rows
from moesaic.moe.dispatcher import ContiguousRows, DispatchMode, ExpertRows, MaskedRows


@dataclass(frozen=True, kw_only=True)
class Arranged:
    """Rows for the experts and the way back."""

    rows: ExpertRows
    row_map: RowMap


def arrange(hidden: Tensor, local_ids: Tensor, num_local: int, mode: DispatchMode, alignment: int) -> Arranged:
    """hidden [M, H], local_ids int64 [M, K] (-1 = not here) -> the layout of `mode`.

    The masked layout has room for all M tokens at every expert, as the fixed low-latency layout does.
    """
    if mode is DispatchMode.NORMAL:
        row_map, counts = contiguous_map(local_ids, num_local, alignment)
        return Arranged(rows=ContiguousRows(hidden=to_rows(hidden, row_map), counts=counts), row_map=row_map)
    row_map = masked_map(local_ids, num_local, hidden.shape[0])
    blocks = to_rows(hidden, row_map).view(num_local, hidden.shape[0], hidden.shape[1])
    return Arranged(rows=MaskedRows(hidden=blocks, counts=row_map.counts), row_map=row_map)


def per_choice(expert_rows: Tensor, row_map: RowMap) -> Tensor:
    """Expert outputs in either layout -> [M, K, H], zero where the choice is elsewhere."""
    return from_rows(expert_rows.reshape(row_map.num_rows, expert_rows.shape[-1]), row_map)


def weighted(expert_rows: Tensor, row_map: RowMap, weights: Tensor) -> Tensor:
    """Expert outputs in either layout -> the weighted sum of this rank's experts for each received token, [M, H]."""
    return weighted_rows(expert_rows.reshape(row_map.num_rows, expert_rows.shape[-1]), row_map, weights)
