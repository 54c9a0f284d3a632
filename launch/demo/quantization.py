"""Block FP8 as in the released checkpoints: e4m3 values, one float32 scale per 128 x 128 block of a weight matrix."""

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


def _blocks(matrix: Tensor) -> Tensor:
    """[out, in] -> [ceil(out / 128), 128, ceil(in / 128), 128], padded with zeros."""
    padded = functional.pad(matrix, (0, -matrix.shape[1] % BLOCK, 0, -matrix.shape[0] % BLOCK))
    return padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] float -> float8_e4m3fn [out, in] and scale_inv float32 [ceil(out / 128), ceil(in / 128)].

    `scale_inv` is what the values are multiplied by to get the weights back.
    """
    blocks = _blocks(matrix.float())
    largest = blocks.abs().amax((1, 3))
    scale_inv = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    values = (blocks / scale_inv[:, None, :, None]).to(FP8).float().flatten(2).flatten(0, 1)
    return values[: matrix.shape[0], : matrix.shape[1]].to(FP8).contiguous(), scale_inv


def dequantize(values: Tensor, scale_inv: Tensor) -> Tensor:
    """The weights, float32 [out, in]. values [out, in] float8_e4m3fn, scale_inv as `quantize` returns it."""
    expanded = scale_inv.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return values.float() * expanded[: values.shape[0], : values.shape[1]]
