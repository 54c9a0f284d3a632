"""One byte row per token, so that one message carries hidden state, expert ids and weights together."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_tokens(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """hidden [T, H], ids int64 [T, K] (sent as int32), weights fp32 [T, K] -> uint8 [T, row bytes]."""
    parts = (hidden.contiguous(), ids.int(), weights.contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], dim=1)


def unpack_tokens(packed: Tensor, dtype: torch.dtype, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `pack_tokens`: uint8 [M, row bytes] -> hidden [M, H] of dtype, ids int64 [M, K], weights fp32 [M, K]."""
    hidden, ids, weights = torch.split(packed, [packed.shape[1] - 8 * topk, 4 * topk, 4 * topk], dim=1)
    return (
        hidden.contiguous().view(dtype),
        ids.contiguous().view(torch.int32).long(),
        weights.contiguous().view(torch.float32),
    )


def pad_rows(rows: Tensor, num_rows: int) -> Tensor:
    """rows [T, ...] with zero rows appended up to num_rows."""
    out = rows.new_zeros(num_rows, *rows.shape[1:])
    out[: rows.shape[0]] = rows
    return out


def empty_token(hidden_size: int, topk: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One byte row [1, row bytes] of a token without experts: hidden and weights 0, ids -1."""
    return pack_tokens(
        torch.zeros(1, hidden_size, dtype=dtype, device=device),
        torch.full((1, topk), -1, device=device),
        torch.zeros(1, topk, device=device),
    )
