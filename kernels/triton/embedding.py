"""Token embedding on a GPU: a gather of rows, zeros where another rank has the row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.embedding import check_embedding
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two

TILE = 2048


@triton.jit(do_not_specialize=["first_id"])
def _embed_kernel(
    token_ids: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    first_id: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    table_stride: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row = tl.load(token_ids + token).to(tl.int64) - first_id
    is_here = (row >= 0) & (row < num_rows)
    values = tl.load(table + row * table_stride + columns, mask=(columns < width) & is_here, other=0.0)
    tl.store(out + token * width + columns, values, mask=columns < width)


def embed(token_ids: Tensor, table: Tensor, *, first_id: int = 0) -> Tensor:
    """As `kernels.embedding.embed`."""
    check_embedding(token_ids, table, first_id)
    num_rows, width = table.shape
    out = table.new_empty(len(token_ids), width)
    tile = min(TILE, power_of_two(width))
    launch(
        _embed_kernel,
        (len(token_ids), ceil_div(width, tile)),
        token_ids=token_ids,
        table=table,
        out=out,
        first_id=first_id,
        num_rows=num_rows,
        width=width,
        table_stride=table.stride(0),
        TILE=tile,
    )
    return out
