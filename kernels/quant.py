"""FP8 (e4m3) quantisation as DeepSeek-V3 was trained with: activations per 1x128, weights per 128x128 block, scales in fp32.

A block is a quantisation block. The last block of a dimension may be ragged. "Scale" is what a stored value is multiplied with
(`weight_scale_inv` in the released checkpoints).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> (fp8 [T, K], scales fp32 [T, ceil(K / 128)]), each 1x128 block scaled to the full range of e4m3."""
    num_tokens, width = x.shape
    num_blocks = -(-width // BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, num_blocks * BLOCK - width)).view(num_tokens, num_blocks, BLOCK)
    scales = padded.abs().amax(-1).clamp(min=1e-4) / FP8_MAX
    quantized = (padded / scales.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return quantized.view(num_tokens, num_blocks * BLOCK)[:, :width], scales


def dequantize_per_token(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize_per_token`: (fp8 [T, K], fp32 [T, ceil(K / 128)]) -> [T, K] of dtype."""
    spread = scales.repeat_interleave(BLOCK, dim=1)[:, : quantized.shape[1]]
    return (quantized.float() * spread).to(dtype)


def round_to_fp8(x: Tensor) -> Tensor:
    """x [..., K] as the FP8 GEMMs see it: quantised per 1x128 and dequantised again, in x's dtype and shape."""
    rows = x.reshape(-1, x.shape[-1])
    return dequantize_per_token(*quantize_per_token(rows), x.dtype).view(x.shape)


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (fp8 [N, K], scales fp32 [ceil(N / 128), ceil(K / 128)])."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / FP8_MAX
    quantized = (blocks / scales[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return quantized.view(padded.shape)[:rows, :columns].contiguous(), scales


def dequantize_blocks(
    quantized: Tensor, scales: Tensor, dtype: torch.dtype, *, row_offset: int = 0, column_offset: int = 0
) -> Tensor:
    """A slice of a block-quantised weight, fp8 [n, k], back in dtype.

    `scales` are those of the blocks that the slice touches; the offsets say where in its first block the slice begins.
    """
    rows, columns = quantized.shape
    row_block = (torch.arange(rows) + row_offset) // BLOCK
    column_block = (torch.arange(columns) + column_offset) // BLOCK
    return (quantized.float() * scales[row_block][:, column_block]).to(dtype)
