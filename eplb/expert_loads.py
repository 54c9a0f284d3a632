"""Load of the logical experts as the placement sees it: its mean, and optionally how much it varies over time.

What a GPU should be charged for is its mean load plus RISK standard deviations, the root of the sum of its pieces' variances (loads
of different experts taken as independent). Around balanced GPUs that is, to first order, a sum over pieces again: volatile pieces
simply weigh more, and every method for plain loads serves.

    L layers, E experts; a piece is one replica's share of its expert's load
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic.eplb.location import Int64Array

FloatArray = NDArray[np.float64]

RISK = 1.0


@dataclass(frozen=True, kw_only=True)
class ExpertLoads:
    """mean float64 [L, E], not negative; std float64 [L, E] in the same unit, or None when unknown."""

    mean: FloatArray
    std: FloatArray | None = None

    @staticmethod
    def of_windows(windows: FloatArray) -> ExpertLoads:
        """From loads [W, L, E]. The std is that of the shares of a layer's load: how much traffic a window had does not count."""
        mean: FloatArray = windows.mean(axis=0)
        layer_load = windows.sum(axis=2, keepdims=True)
        counted = layer_load > 0
        share = np.divide(windows, layer_load, out=np.zeros_like(windows), where=counted)
        num_counted = np.maximum(counted.sum(axis=0), 1)
        difference = np.where(counted, share - share.sum(axis=0) / num_counted, 0.0)
        std = np.sqrt((difference**2).sum(axis=0) / num_counted) * mean.sum(axis=1, keepdims=True)
        return ExpertLoads(mean=mean, std=std)

    def take(self, layers: Int64Array) -> ExpertLoads:
        return ExpertLoads(mean=self.mean[layers], std=None if self.std is None else self.std[layers])

    @property
    def cautious(self) -> FloatArray:
        """What replicas are given by: mean plus RISK standard deviations, [L, E]."""
        return self.mean if self.std is None else self.mean + RISK * self.std

    def is_uniform(self) -> NDArray[np.bool_]:
        """Whether all experts of a layer have the same load, [L]."""
        load = self.cautious
        uniform: NDArray[np.bool_] = (load == load[:, :1]).all(axis=1)
        return uniform

    def of_replica(self, count: Int64Array, num_gpus: int) -> FloatArray:
        """Weight of one replica of every expert that has `count` [L, E] of them: mean load, and its part of the GPU's deviation.

        With v = sum over slots of (std / count)^2 / G, a balanced GPU deviates by sqrt(v), to which a piece adds its
        (std / count)^2 / (2 sqrt(v)).
        """
        piece: FloatArray = self.mean / count
        if self.std is None:
            return piece
        variance = (self.std / count) ** 2
        root = np.sqrt((variance * count).sum(axis=1, keepdims=True) / num_gpus)
        piece += RISK * np.divide(variance, 2 * root, out=np.zeros_like(variance), where=root > 0)
        return piece
