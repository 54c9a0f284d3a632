"""Reads the matrices that every token meets (projections, feed-forwards): in the model's dtype, or in FP8 as stored.

Knows the rank's dtype and device, and whether FP8 stays; not the model's layers. What is computed with in another form than FP8
is read by `tensor`: kv_b_proj (its halves are absorbed into queries and outputs), norms, gates, embedding and head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.gemm import BlockWeight, Matrix, stacked
from moesaic.kernels.grouped_backends import Name, dense_unfit_reason
from moesaic.launch.models.weights import Shard, WeightSource

Part = tuple[str, tuple[int, int], Shard | None]
"""A matrix by the checkpoint's name, its whole shape [out, in], and the rank's part of it."""


class MatrixLoader:
    """`fp8_backends`: matrices stay in FP8, and these compute with them; () dequantises."""

    def __init__(self, source: WeightSource, *, dtype: torch.dtype, device: str, fp8_backends: tuple[Name, ...] = ()) -> None:
        self._source, self._dtype, self._device, self._backends = source, dtype, device, fp8_backends

    def tensor(self, name: str, *shape: int, shard: Shard | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """In the model's dtype, or another. Raises CheckpointError."""
        return self._source.tensor(name, shape, dtype or self._dtype, shard).to(self._device)

    def matrix(self, *parts: Part) -> Matrix:
        """One weight of all parts' rows, one after the other. Raises CheckpointError, and ValueError for an FP8 shape that none
        of the backends takes.
        """
        if self._backends:
            return stacked(*(self._blocks(*part) for part in parts))
        tensors = [self.tensor(name, *shape, shard=shard) for name, shape, shard in parts]
        return out_fastest(tensors[0] if len(tensors) == 1 else torch.cat(tensors))

    def _blocks(self, name: str, shape: tuple[int, int], shard: Shard | None) -> BlockWeight:
        values, scales = self._source.quantized(name, shape, shard)
        width, depth = values.shape
        reasons = {backend: dense_unfit_reason(backend, width, depth) for backend in self._backends}
        able = tuple(backend for backend, reason in reasons.items() if reason is None)
        if not able:
            raise ValueError(f"{name}: no FP8 product: " + "; ".join(f"{backend} {reason}" for backend, reason in reasons.items()))
        return BlockWeight(values=values.to(self._device), scales=scales.to(self._device), backends=able)


def out_fastest(weight: Tensor) -> Tensor:
    """The same [out, in] matrix with its columns contiguous: on CPU a product with few rows reads it up to a third faster."""
    return weight.t().contiguous().t()
