"""What one lockstep forward is: immutable, derived from the step headers, handed to the model with the rank's own rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic.attention.metadata import AttentionMetadata
from moesaic.moe.dispatcher import DispatchPlan


@dataclass(frozen=True, kw_only=True)
class ForwardInput:
    """input_ids int64 [T]; logit_rows int64 [N]: rows whose logits are wanted.

    num_logits_per_dp_rank: N of every DP rank (for a head split over all ranks). plan: the step's dispatch.
    """

    input_ids: Tensor
    metadata: AttentionMetadata
    plan: DispatchPlan
    logit_rows: Tensor
    num_logits_per_dp_rank: tuple[int, ...]
