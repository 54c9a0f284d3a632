"""MLA decode in absorbed form: queries meet the latent KV directly (DeepSeek-V2, section 2.1.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.gpu import uses_triton
from moesaic.kernels.native.library import kernels_for
from moesaic.kernels.quant import FP8

HEADS_AT_ONCE = 4
"""Heads that share one reading of a latent row (mla.c)."""
LONGEST_VECTOR = 16
"""Elements that the native kernel may write after a head's scores."""
SPLIT_TOKENS = 4096
"""Context that one program of the device kernel reads; a batch of decode rows of one rank fills a GPU without more splits."""


def mla_decode(
    query: Tensor,
    pool_rows: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
    value_dim: int,
    scale: float,
    split_tokens: int = SPLIT_TOKENS,
    kv_scale: float = 1.0,
) -> Tensor:
    """One query token per sequence over that sequence's latent rows.

    query [B, heads, D] (absorbed latent part, then rotary part), pool_rows [S, D] in pages of `page_size`, page_table int64 [B, P],
    seq_lens int64 [B] -> [B, heads, value_dim]. Softmax in fp32. A pool in FP8 (e4m3) is multiplied with `kv_scale`.
    A device cuts every context after `split_tokens`, whatever the batch is. Raises ValueError on a device.
    """
    if uses_triton(query):
        from moesaic.kernels.triton import mla_decode as device

        return device.mla_decode(
            query.contiguous(),
            pool_rows,
            page_table.contiguous(),
            seq_lens,
            page_size=page_size,
            value_dim=value_dim,
            scale=scale,
            split_tokens=split_tokens,
            kv_scale=kv_scale,
        )
    native = kernels_for(query)
    if native is None or kernels_for(pool_rows) is None:
        return mla_decode_reference(
            query,
            pool_rows,
            page_table,
            seq_lens,
            page_size=page_size,
            value_dim=value_dim,
            scale=scale,
            kv_scale=kv_scale,
        )
    query, page_table = query.contiguous(), page_table.contiguous()
    num_rows, heads, width = query.shape
    longest = page_table.shape[1] * page_size
    threads = torch.get_num_threads()
    out = query.new_empty(num_rows, heads, value_dim)
    scores = query.new_empty(threads * HEADS_AT_ONCE * (longest + LONGEST_VECTOR))
    rows = torch.empty(threads * longest, dtype=torch.int64)
    native.mla_decode(
        query.data_ptr(),
        pool_rows.data_ptr(),
        page_table.data_ptr(),
        seq_lens.data_ptr(),
        num_rows,
        heads,
        width,
        value_dim,
        page_table.shape[1],
        page_size,
        scale,
        out.data_ptr(),
        scores.data_ptr(),
        rows.data_ptr(),
        threads,
    )
    return out


def mla_decode_reference(
    query: Tensor,
    pool_rows: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    page_size: int,
    value_dim: int,
    scale: float,
    kv_scale: float = 1.0,
) -> Tensor:
    """The same in torch, any device and dtype: gathers the pages, pads every sequence to the table's width."""
    if pool_rows.dtype is FP8:
        pool_rows = (pool_rows.float() * kv_scale).to(query.dtype)
    pages = pool_rows.view(-1, page_size * pool_rows.shape[1]).index_select(0, page_table.flatten())
    latent = pages.view(len(page_table), -1, pool_rows.shape[1])
    beyond = torch.arange(latent.shape[1], device=latent.device) >= seq_lens.unsqueeze(1)
    latent.masked_fill_(beyond.unsqueeze(2), 0)  # what others have left there may be NaN, and 0 times NaN is NaN
    bias = torch.zeros(beyond.shape, device=beyond.device).masked_fill_(beyond, float("-inf")).unsqueeze(1)
    scores = torch.baddbmm(bias, query.float(), latent.float().transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1).to(latent.dtype), latent[..., :value_dim])
