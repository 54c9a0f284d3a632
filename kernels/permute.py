"""Tokens to expert rows and back: the two receive layouts of a dispatch, and the weighted sums of a combine.

topk_ids here are *local* expert ids in [0, num_experts), -1 = the choice lies on another rank. Rows of one expert keep the order
of their tokens, and sums run in top-k order, so results never depend on arrival.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.kernels.gpu import uses_triton
from moesaic.kernels.native.library import kernels_for, status


@dataclass(frozen=True, kw_only=True)
class RowMap:
    """Where each choice of each token lies among the expert rows, and the way there.

    row int64 [T, K] (meaningless where the choice lies elsewhere), elsewhere bool [T, K] (None: no choice does), counts int64 [E],
    num_rows of the layout. Token tokens[i] goes to row targets[i], or, without `targets`, to row i.
    """

    row: Tensor
    elsewhere: Tensor | None
    counts: Tensor
    num_rows: int
    tokens: Tensor
    targets: Tensor | None

    @property
    def valid(self) -> Tensor:
        """bool [T, K]: the choice lies here."""
        return torch.ones_like(self.row, dtype=torch.bool) if self.elsewhere is None else ~self.elsewhere


def contiguous_map(topk_ids: Tensor, num_experts: int, alignment: int) -> tuple[RowMap, list[int]]:
    """Rows sorted by expert, each expert's block starting at a multiple of `alignment`; returns the map and padded counts.

    The padded counts are on the CPU: this layout is for callers that may wait.
    """
    if uses_triton(topk_ids):
        from moesaic.kernels.triton import permute as triton_permute

        return triton_permute.contiguous_map(topk_ids.contiguous(), num_experts, alignment)
    native = status().library
    if native is not None and topk_ids.device.type == "cpu" and alignment == 1:
        return _sorted_map(native, topk_ids.contiguous(), num_experts)
    device, num_choices = topk_ids.device, topk_ids.shape[1]
    flat = topk_ids.flatten().cpu().numpy()  # a few hundred small integers: numpy is several times faster than torch on them
    order = np.argsort(flat, kind="stable")
    num_elsewhere, *counts = np.bincount(flat + 1, minlength=num_experts + 1).tolist()
    here = order[num_elsewhere:]
    padded = [-(-count // alignment) * alignment for count in counts]
    targets = np.arange(len(here)) if alignment == 1 else _padded_rows(np.array(counts), np.array(padded))
    row = np.zeros_like(flat)
    row[here] = targets
    row_map = RowMap(
        row=torch.from_numpy(row).to(device).view_as(topk_ids),
        elsewhere=topk_ids < 0 if num_elsewhere else None,
        counts=torch.tensor(counts, device=device),
        num_rows=sum(padded),
        tokens=torch.from_numpy(here // max(num_choices, 1)).to(device),
        targets=None if alignment == 1 else torch.from_numpy(targets).to(device),
    )
    return row_map, padded


def _sorted_map(native: ctypes.CDLL, topk_ids: Tensor, num_experts: int) -> tuple[RowMap, list[int]]:
    row = torch.empty_like(topk_ids)
    tokens = topk_ids.new_empty(topk_ids.numel())
    counts, scratch = topk_ids.new_empty(num_experts), topk_ids.new_empty(num_experts)
    num_rows = native.sort_choices(
        topk_ids.data_ptr(),
        topk_ids.numel(),
        max(topk_ids.shape[1], 1),
        num_experts,
        counts.data_ptr(),
        row.data_ptr(),
        tokens.data_ptr(),
        scratch.data_ptr(),
    )
    row_map = RowMap(
        row=row,
        elsewhere=topk_ids < 0 if num_rows < topk_ids.numel() else None,
        counts=counts,
        num_rows=num_rows,
        tokens=tokens[:num_rows],
        targets=None,
    )
    return row_map, counts.tolist()


def _padded_rows(used: npt.NDArray[np.int64], room: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows that are used when each expert's block is padded, in order."""
    gaps = (room - used).cumsum() - (room - used)
    rows: npt.NDArray[np.int64] = np.arange(used.sum()) + gaps.repeat(used)
    return rows


def masked_map(topk_ids: Tensor, num_experts: int, rows_per_expert: int) -> RowMap:
    """Rows [E, rows_per_expert], each expert's valid rows first. No value leaves the device and no shape depends on one."""
    if uses_triton(topk_ids):
        from moesaic.kernels.triton import permute as triton_permute

        return triton_permute.masked_map(topk_ids.contiguous(), num_experts, rows_per_expert)
    return masked_map_reference(topk_ids, num_experts, rows_per_expert)


def masked_map_reference(topk_ids: Tensor, num_experts: int, rows_per_expert: int) -> RowMap:
    """The same in torch, any device."""
    flat = topk_ids.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat + 1, torch.ones_like(flat))
    expert = flat[order]
    position = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[expert + 1]
    num_rows = num_experts * rows_per_expert
    targets = torch.where(expert >= 0, expert * rows_per_expert + position, num_rows)  # choices elsewhere: a row past the end
    return RowMap(
        row=torch.empty_like(flat).index_copy_(0, order, targets).view_as(topk_ids),
        elsewhere=topk_ids < 0,
        counts=counts[1:],
        num_rows=num_rows,
        tokens=order.div(topk_ids.shape[1], rounding_mode="floor"),
        targets=targets,
    )


def to_rows(hidden: Tensor, row_map: RowMap, *, zero_padding: bool = True) -> Tensor:
    """hidden [T, H] -> expert rows [num_rows, H]; rows that no choice fills are zero, or unspecified without `zero_padding`."""
    if uses_triton(hidden):
        from moesaic.kernels.triton import permute as triton_permute

        return triton_permute.to_rows(hidden, row_map, zero_padding=zero_padding)
    return to_rows_reference(hidden, row_map)


def to_rows_reference(hidden: Tensor, row_map: RowMap) -> Tensor:
    """The same in torch, any device and dtype, always with zeros."""
    rows = hidden.index_select(0, row_map.tokens)
    if row_map.targets is None:
        return rows
    out = hidden.new_zeros(row_map.num_rows + 1, hidden.shape[1])
    return out.index_copy_(0, row_map.targets, rows)[: row_map.num_rows]


def from_rows(rows: Tensor, row_map: RowMap) -> Tensor:
    """Expert rows [num_rows, H] -> [T, K, H]; zero where the choice is -1."""
    if uses_triton(rows):
        from moesaic.kernels.triton import permute as triton_permute

        return triton_permute.from_rows(rows.contiguous(), row_map)
    return from_rows_reference(rows, row_map)


def from_rows_reference(rows: Tensor, row_map: RowMap) -> Tensor:
    """The same in torch, any device and dtype."""
    if row_map.num_rows == 0:
        return rows.new_zeros(*row_map.row.shape, rows.shape[1])
    row = row_map.row.flatten()
    if row_map.elsewhere is None:
        return rows.index_select(0, row).view(*row_map.row.shape, rows.shape[1])
    gathered = rows.index_select(0, row.clamp(max=row_map.num_rows - 1)).view(*row_map.row.shape, rows.shape[1])
    return gathered.masked_fill_(row_map.elsewhere.unsqueeze(-1), 0)


def weighted_rows(rows: Tensor, row_map: RowMap, weights: Tensor) -> Tensor:
    """Expert rows [num_rows, H] -> their weighted sum per token [T, H], in fp32 and top-k order; choices elsewhere add nothing."""
    if uses_triton(rows):
        from moesaic.kernels.triton import permute as triton_permute

        return triton_permute.weighted_rows(rows.contiguous(), row_map, weights.contiguous())
    native = kernels_for(rows)
    if native is None or not rows.is_contiguous():
        return weighted_sum(from_rows_reference(rows, row_map), weights)
    row, weights = row_map.row, weights.float().contiguous()
    if row_map.elsewhere is not None:
        row = row.masked_fill(row_map.elsewhere, -1)
    out = rows.new_empty(row.shape[0], rows.shape[1])
    native.weighted_rows(
        rows.data_ptr(), row.data_ptr(), weights.data_ptr(), *row.shape, rows.shape[1], out.data_ptr(), torch.get_num_threads()
    )
    return out


def weighted_sum(choices: Tensor, weights: Tensor) -> Tensor:
    """choices [T, K, H] summed over K with weights fp32 [T, K], in fp32 and top-k order; returns choices' dtype [T, H]."""
    return torch.bmm(weights.float().unsqueeze(1), choices.float()).squeeze(1).to(choices.dtype)
