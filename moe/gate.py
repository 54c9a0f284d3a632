"""The router of a sparse layer: hidden states to logical expert ids and weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic.kernels.gemm import linear
from moesaic.kernels.topk import grouped_topk
from moesaic.moe.config import GateConfig


@dataclass(frozen=True, kw_only=True)
class TopK:
    """ids int64 [T, K]: logical experts as the gate chose them, slots once replicas are chosen; weights fp32 [T, K].

    -1 is nobody; its weight is 0.
    """

    ids: Tensor
    weights: Tensor

    def of_valid(self, valid: Tensor) -> TopK:
        """The choice with nobody for rows where `valid`, bool [T], is False."""
        blank = ~valid.unsqueeze(1)
        return TopK(ids=self.ids.masked_fill(blank, -1), weights=self.weights.masked_fill(blank, 0.0))


class Gate:
    """weight fp32 [E, H], correction_bias fp32 [E]; logits are computed in fp32 whatever the model's dtype."""

    def __init__(self, config: GateConfig, weight: Tensor, correction_bias: Tensor) -> None:
        self._config = config
        self._weight = weight
        self._correction_bias = correction_bias

    @property
    def topk(self) -> int:
        """Experts per token, K."""
        return self._config.topk

    def select(self, hidden: Tensor) -> TopK:
        """hidden [T, H] -> the chosen experts of each token."""
        config = self._config
        ids, weights = grouped_topk(
            linear(hidden.float(), self._weight),
            self._correction_bias,
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            topk=config.topk,
            normalize=config.normalize,
            scaling_factor=config.scaling_factor,
        )
        return TopK(ids=ids, weights=weights)
