"""What one lockstep forward is: immutable, derived from the step headers, handed to the model with the rank's own rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moesaic.attention.metadata import AttentionMetadata
from moesaic.moe.dispatcher import DispatchPlan
from moesaic.overlap.split import split_batch, splittable


def _split_valid(valid: Tensor | None, cut: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if valid is None else (valid[:cut], valid[cut:])


@splittable
@dataclass(frozen=True, kw_only=True)
class ForwardInput:
    """input_ids int64 [T]; logit_rows int64 [N]: rows whose logits are wanted.

    num_logits_per_dp_rank: N of every DP rank (for a head split over all ranks). plan: the step's dispatch. valid bool [T]: False
    for rows that pad the step, which no expert is to get; None: there are none.
    """

    input_ids: Tensor = field(metadata={"axis": "rows"})
    metadata: AttentionMetadata = field(metadata={"axis": "batch"})
    plan: DispatchPlan = field(metadata={"axis": "given"})
    logit_rows: Tensor = field(metadata={"axis": "row_ids"})
    num_logits_per_dp_rank: tuple[int, ...] = field(metadata={"axis": "given"})
    valid: Tensor | None = field(default=None, metadata={"axis": _split_valid})

    def split(
        self, cut: int, plans: tuple[DispatchPlan, DispatchPlan], num_logits: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> tuple[ForwardInput, ForwardInput]:
        """Micro-batches of rows [0, cut) and [cut, T), each a whole forward of its own; what the ranks agree on is handed over.

        Cut inside a sequence, the first must write a layer's KV before the second attends in it. Raises ValueError for a cut that
        lies outside the rows.
        """
        return split_batch(self, cut, plan=plans, num_logits_per_dp_rank=num_logits)


@dataclass(frozen=True, kw_only=True)
class ForwardSplit:
    """A forward's two micro-batches. `extends`: some rank computes prompt tokens (all ranks run the same schedule)."""

    first: ForwardInput
    second: ForwardInput
    extends: bool
