"""FP8 (e4m3) quantisation as DeepSeek-V3 was trained with: activations per 1x128, weights per 128x128 block, scales in fp32.

A block is a quantisation block. The last block of a dimension may be ragged. "Scale" is what a stored value is multiplied with
(`weight_scale_inv` in the released checkpoints). CUDA tensors go to kernels/triton/quant.py, everything else stays in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.gpu import uses_triton

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
TMA_ALIGNMENT = 4
"""fp32 scales in the 16 bytes that the tensor memory accelerator (TMA) wants a stride to be a multiple of."""


def quantize_per_token(x: Tensor, *, mn_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """x [T, K] -> (fp8 [T, K], scales fp32 [T, ceil(K / 128)]), each 1x128 block scaled to the full range of e4m3.

    With `mn_major_scales` the scales lie in memory as DeepGEMM wants them on Hopper: tokens running fastest, each block's column
    starting at a multiple of 16 bytes. Raises ValueError on a device, for x of another shape or dtype.
    """
    if uses_triton(x):
        from moesaic.kernels.triton import quant as device

        return device.quantize_per_token(x, mn_major_scales=mn_major_scales)
    return quantize_per_token_reference(x, mn_major_scales=mn_major_scales)


def empty_scales(x: Tensor, *, mn_major: bool) -> Tensor:
    """Room for the scales of x [..., T, K]: fp32 [..., T, ceil(K / 128)] in either of the two layouts in memory."""
    *lead, num_tokens, width = x.shape
    num_blocks = -(-width // BLOCK)
    if not mn_major:
        return x.new_empty(*lead, num_tokens, num_blocks, dtype=torch.float32)
    room = -(-num_tokens // TMA_ALIGNMENT) * TMA_ALIGNMENT
    return x.new_empty(*lead, num_blocks, room, dtype=torch.float32).transpose(-1, -2)[..., :num_tokens, :]


def quantize_per_token_reference(x: Tensor, *, mn_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """The same in torch, any device and dtype."""
    num_tokens, width = x.shape
    num_blocks = -(-width // BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, num_blocks * BLOCK - width)).view(num_tokens, num_blocks, BLOCK)
    scales = padded.abs().amax(-1).clamp(min=1e-4) / FP8_MAX
    quantized = (padded / scales.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    if mn_major_scales:
        scales = empty_scales(x, mn_major=True).copy_(scales)
    return quantized.view(num_tokens, num_blocks * BLOCK)[:, :width].contiguous(), scales


def dequantize_per_token(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize_per_token`: (fp8 [T, K], fp32 [T, ceil(K / 128)]) -> [T, K] of dtype."""
    if uses_triton(quantized):
        from moesaic.kernels.triton import quant as device

        return device.dequantize_per_token(quantized, scales, dtype)
    return dequantize_per_token_reference(quantized, scales, dtype)


def dequantize_per_token_reference(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in torch, any device."""
    spread = scales.repeat_interleave(BLOCK, dim=1)[:, : quantized.shape[1]]
    return (quantized.float() * spread).to(dtype)


def round_to_fp8(x: Tensor) -> Tensor:
    """x [..., K] as the FP8 GEMMs see it: quantised per 1x128 and dequantised again, in x's dtype and shape."""
    rows = x.reshape(-1, x.shape[-1])
    return dequantize_per_token(*quantize_per_token(rows), x.dtype).view(x.shape)


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (fp8 [N, K], scales fp32 [ceil(N / 128), ceil(K / 128)])."""
    if uses_triton(weight):
        from moesaic.kernels.triton import quant as device

        return device.quantize_blocks(weight)
    return quantize_blocks_reference(weight)


def quantize_blocks_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same in torch, any device and dtype."""
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
    if uses_triton(quantized):
        from moesaic.kernels.triton import quant as device

        return device.dequantize_blocks(quantized, scales, dtype, row_offset=row_offset, column_offset=column_offset)
    return dequantize_blocks_reference(quantized, scales, dtype, row_offset=row_offset, column_offset=column_offset)


def dequantize_blocks_reference(
    quantized: Tensor, scales: Tensor, dtype: torch.dtype, *, row_offset: int = 0, column_offset: int = 0
) -> Tensor:
    """The same in torch, any device."""
    rows, columns = quantized.shape
    row_block = (torch.arange(rows, device=quantized.device) + row_offset) // BLOCK
    column_block = (torch.arange(columns, device=quantized.device) + column_offset) // BLOCK
    return (quantized.float() * scales[row_block][:, column_block]).to(dtype)
