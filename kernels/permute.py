"""Tokens to expert rows and back: the two receive layouts of a dispatch, and the weighted sums of a combine.

topk_ids here are *local* expert ids in [0, num_experts), -1 = the choice lies on another rank. Rows of one expert keep the order
of their tokens, and sums run in top-k order, so results never depend on arrival.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowMap:
    """Where each choice of each token lies among the expert rows.

    row int64 [T, K] (0 where the choice is -1), valid bool [T, K], counts int64 [E], num_rows of the layout.
    """

    row: Tensor
    valid: Tensor
    counts: Tensor
    num_rows: int


def _ranks_within_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(position of each valid choice among its expert's rows [n], its expert [n], counts [E]); n choices in token order."""
    experts = topk_ids[topk_ids >= 0]
    counts = torch.bincount(experts, minlength=num_experts)
    order = torch.argsort(experts, stable=True)
    starts = counts.cumsum(0) - counts
    position = torch.empty_like(experts)
    position[order] = torch.arange(experts.numel(), device=experts.device) - starts[experts[order]]
    return position, experts, counts


def _map(topk_ids: Tensor, rows: Tensor, counts: Tensor, num_rows: int) -> RowMap:
    valid = topk_ids >= 0
    row = torch.zeros_like(topk_ids)
    row[valid] = rows
    return RowMap(row=row, valid=valid, counts=counts, num_rows=num_rows)


def contiguous_map(topk_ids: Tensor, num_experts: int, alignment: int) -> tuple[RowMap, list[int]]:
    """Rows sorted by expert, each expert's block starting at a multiple of `alignment`; returns the map and padded counts.

    The padded counts are on the CPU: this layout is for callers that may wait.
    """
    position, experts, counts = _ranks_within_expert(topk_ids, num_experts)
    padded = (counts + alignment - 1) // alignment * alignment
    starts = padded.cumsum(0) - padded
    padded_counts = padded.tolist()
    return _map(topk_ids, starts[experts] + position, counts, sum(padded_counts)), padded_counts


def masked_map(topk_ids: Tensor, num_experts: int, rows_per_expert: int) -> RowMap:
    """Rows [E, rows_per_expert], each expert's valid rows first. No value leaves the device."""
    position, experts, counts = _ranks_within_expert(topk_ids, num_experts)
    return _map(topk_ids, experts * rows_per_expert + position, counts, num_experts * rows_per_expert)


def to_rows(hidden: Tensor, row_map: RowMap) -> Tensor:
    """hidden [T, H] -> expert rows [num_rows, H]; rows that no choice fills are zero."""
    rows = hidden.new_zeros(row_map.num_rows, hidden.shape[1])
    tokens, choices = row_map.valid.nonzero(as_tuple=True)
    rows[row_map.row[tokens, choices]] = hidden[tokens]
    return rows


def from_rows(rows: Tensor, row_map: RowMap) -> Tensor:
    """Expert rows [num_rows, H] -> [T, K, H]; zero where the choice is -1."""
    if row_map.num_rows == 0:
        return rows.new_zeros(*row_map.row.shape, rows.shape[1])
    gathered = rows.index_select(0, row_map.row.flatten()).view(*row_map.row.shape, rows.shape[1])
    return torch.where(row_map.valid.unsqueeze(-1), gathered, 0)


def weighted_sum(choices: Tensor, weights: Tensor) -> Tensor:
    """choices [T, K, H] summed over K with weights fp32 [T, K], in fp32 and top-k order; returns choices' dtype [T, H]."""
    return torch.bmm(weights.float().unsqueeze(1), choices.float()).squeeze(1).to(choices.dtype)
