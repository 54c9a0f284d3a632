"""Token embedding: rows of a table, or of a rank's share of it."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.checks import FLOATS, INDICES, check_number, check_tensor
from moesaic.kernels.gpu import uses_triton


def embed(token_ids: Tensor, table: Tensor, *, first_id: int = 0) -> Tensor:
    """token_ids int64 or int32 [T], rows of ids from `first_id` on in table [V, H] -> [T, H].

    Ids whose row another rank has (below first_id, or first_id + V and above) give zeros. Raises ValueError.
    """
    if uses_triton(token_ids):
        from moesaic.kernels.triton import embedding as device

        return device.embed(token_ids, table, first_id=first_id)
    return embed_reference(token_ids, table, first_id=first_id)


def embed_reference(token_ids: Tensor, table: Tensor, *, first_id: int = 0) -> Tensor:
    """The same in torch, any device."""
    check_embedding(token_ids, table, first_id)
    row = token_ids.long() - first_id
    is_here = (row >= 0) & (row < table.shape[0])
    if not table.shape[0]:
        return table.new_zeros(len(row), table.shape[1])
    return table.index_select(0, row.clamp(0, table.shape[0] - 1)).masked_fill_(~is_here.unsqueeze(1), 0)


def check_embedding(token_ids: Tensor, table: Tensor, first_id: int) -> None:
    """What `embed` refuses. Raises ValueError."""
    check_tensor("embed", "token_ids", token_ids, shape=(None,), dtypes=INDICES)
    check_tensor("embed", "table", table, shape=(None, None), dtypes=(*FLOATS, torch.float64), like=token_ids)
    check_number("embed", "first_id", first_id, at_least=0)
