"""One small matrix per head: queries into the latent space and attention outputs out of it (DeepSeek-V2, section 2.1.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.native.library import kernels_for


def head_product(x: Tensor, weight: Tensor, *, tail: int = 0) -> Tensor:
    """x [T, heads, K + tail], weight [heads, K, N] -> [T, heads, N + tail]; the last `tail` elements pass as they are."""
    native = kernels_for(x)
    if native is None or x.stride(2) != 1 or weight.stride(2) != 1:
        return head_product_reference(x, weight, tail=tail)
    heads, depth, width = weight.shape
    num_tokens = x.shape[0]
    out = x.new_empty(num_tokens, heads, width + tail)
    native.head_product(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        weight.data_ptr(),
        weight.stride(0),
        weight.stride(1),
        num_tokens,
        heads,
        depth,
        width,
        tail,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def head_product_reference(x: Tensor, weight: Tensor, *, tail: int = 0) -> Tensor:
    """The same in torch, any device and dtype."""
    mapped, rest = torch.split(x, [weight.shape[1], tail], dim=2)
    product = torch.bmm(mapped.transpose(0, 1), weight).transpose(0, 1)
    return torch.cat([product, rest], dim=2) if tail else product.contiguous()
