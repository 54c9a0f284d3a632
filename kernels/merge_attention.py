"""Two attentions of the same queries over different parts of their context become one, by their log-sum-exp (Milakov and
Gimelshein, 2018; FlashAttention's and FlashInfer's merge).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.checks import FLOATS, check_tensor
from moesaic.kernels.gpu import uses_triton


def merge_attention(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """first, second [T, heads, V] with fp32 lse [T, heads] (natural log; -inf: saw nothing) -> (merged [T, heads, V], lse).

    Summed in fp32. Rows that saw nothing in either part are 0. Raises ValueError.
    """
    if uses_triton(first):
        from moesaic.kernels.triton import merge_attention as device

        return device.merge_attention(first, first_lse, second, second_lse)
    return merge_attention_reference(first, first_lse, second, second_lse)


def merge_attention_reference(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The same in torch, any device."""
    check_merge(first, first_lse, second, second_lse)
    lse = torch.logaddexp(first_lse, second_lse)
    merged = torch.zeros(first.shape, dtype=torch.float32, device=first.device)
    for part, own in ((first, first_lse), (second, second_lse)):
        weight = torch.where(own == float("-inf"), 0.0, (own - lse).exp()).unsqueeze(-1)
        merged += torch.where(weight > 0, weight * part.float(), 0.0)
    return merged.to(first.dtype), lse


def check_merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> None:
    """What `merge_attention` refuses. Raises ValueError."""
    check_tensor("merge_attention", "first", first, shape=(None, None, None), dtypes=FLOATS, contiguous=True)
    check_tensor("merge_attention", "second", second, shape=first.shape, dtypes=(first.dtype,), like=first, contiguous=True)
    for name, lse in (("first_lse", first_lse), ("second_lse", second_lse)):
        check_tensor("merge_attention", name, lse, shape=first.shape[:2], dtypes=(torch.float32,), like=first, contiguous=True)
