"""The log-sum-exp merge of two attentions on a GPU, one program per token and tile of heads; reads and writes everything once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.merge_attention import check_merge
from moesaic.kernels.triton.launch import ceil_div, launch, power_of_two

TILE = 2048
"""Elements of one program."""


@triton.jit
def _merge_kernel(
    first: tl.tensor,
    first_lse: tl.tensor,
    second: tl.tensor,
    second_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    num_heads: tl.tensor,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    heads, columns = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, VALUE_PADDED)
    row = tl.program_id(0).to(tl.int64) * num_heads + heads
    real = heads < num_heads
    one = tl.load(first_lse + row, mask=real, other=float("-inf"))
    other = tl.load(second_lse + row, mask=real, other=float("-inf"))
    most = tl.maximum(one, other)
    base = tl.where(most == float("-inf"), 0.0, most)
    one, other = tl.exp(one - base), tl.exp(other - base)
    total = one + other
    place = row[:, None] * VALUE + columns[None, :]
    inside = real[:, None] & (columns < VALUE)[None, :]
    scale = tl.where(total > 0, total, 1.0)
    one_part = tl.load(first + place, mask=inside & (one > 0)[:, None], other=0.0).to(tl.float32)
    other_part = tl.load(second + place, mask=inside & (other > 0)[:, None], other=0.0).to(tl.float32)
    merged = one_part * (one / scale)[:, None] + other_part * (other / scale)[:, None]
    tl.store(out + place, merged.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, tl.where(total > 0, base + tl.log(scale), float("-inf")), mask=real)


def merge_attention(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.merge_attention.merge_attention`."""
    check_merge(first, first_lse, second, second_lse)
    num_tokens, num_heads, value_dim = first.shape
    out, lse = torch.empty_like(first), torch.empty_like(first_lse)
    if lse.numel():
        padded = power_of_two(value_dim)
        heads = min(max(TILE // padded, 1), power_of_two(num_heads))
        launch(
            _merge_kernel,
            (num_tokens, ceil_div(num_heads, heads)),
            first=first,
            first_lse=first_lse,
            second=second,
            second_lse=second_lse,
            out=out,
            lse=lse,
            num_heads=num_heads,
            VALUE=value_dim,
            VALUE_PADDED=padded,
            HEADS=heads,
        )
    return out, lse
