"""What DeepEP delivers, bf16 rows or FP8 rows with scales, as rows for the experts: in the dtype that they compute in, or as FP8.

Shared by both generations. A scale belongs to 128 channels of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moesaic.kernels.permute import to_rows
from moesaic.kernels.quant import FP8, dequantize_per_token
from moesaic.moe.dispatcher import ExpertRows, MaskedRows
from moesaic.moe.layouts import Arranged, ExpertLayout, arrange

Delivered = Tensor | tuple[Tensor, Tensor]


def as_masked(delivered: Delivered, counts: Tensor, dtype: torch.dtype, expected_rows: int) -> MaskedRows:
    """Low-latency rows [num_local, M, H] (scales fp32 [num_local, M, H / 128]) with counts int32 [num_local], in dtype."""
    if isinstance(delivered, tuple) and dtype is FP8:
        values, scales = delivered
        return MaskedRows(hidden=values, counts=counts.long(), scales=scales, expected_rows=expected_rows)
    return MaskedRows(hidden=_in(dtype, delivered), counts=counts.long(), expected_rows=expected_rows)


def arrange_received(
    delivered: Delivered, local_ids: Tensor, layout: ExpertLayout, dtype: torch.dtype
) -> tuple[Arranged, ExpertRows]:
    """Received tokens [M, H] with local ids int64 [M, K] (-1: elsewhere) -> their arrangement, and the experts' rows in dtype."""
    if not isinstance(delivered, tuple) or dtype is not FP8:
        arranged = arrange(_in(dtype, delivered), local_ids, layout)
        return arranged, arranged.rows
    values, scales = delivered
    arranged = arrange(values.view(torch.uint8), local_ids, layout)  # rows are copied whatever they mean
    hidden = arranged.rows.hidden
    rows = to_rows(scales, arranged.row_map, zero_padding=False).view(*hidden.shape[:-1], scales.shape[1])
    return arranged, replace(arranged.rows, hidden=hidden.view(FP8), scales=rows)


def _in(dtype: torch.dtype, delivered: Delivered) -> Tensor:
    if isinstance(delivered, Tensor):
        return delivered.to(dtype)
    values, scales = delivered
    return dequantize_per_token(values.flatten(0, -2), scales.flatten(0, -2), dtype).view(values.shape)
