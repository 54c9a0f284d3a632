"""A rank's own word on splitting the next step in two micro-batches; what all ranks' words make is step.py's `resolve_split`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.launch.engine.plan import Plan
from moesaic.overlap.split import split_row


@dataclass(frozen=True, kw_only=True)
class SplitProposal:
    """Rows and logits of the first micro-batch, for the step header; 0 and 0: this batch can't be split."""

    first_tokens: int = 0
    first_logits: int = 0


def propose_split(plan: Plan, distribution_threshold: float) -> SplitProposal:
    """Where a rank would cut its plan. Equal plans (attention-TP ranks of a DP group) give equal proposals.

    `distribution_threshold`: share of the rows (`--tbo-token-distribution-threshold`), see `split_row`.
    """
    cut = split_row(plan.num_decode, [chunk.length for chunk in plan.chunks], distribution_threshold)
    if cut is None:
        return SplitProposal()
    logits = min(cut, plan.num_decode) + sum(_logits_before(plan, cut))
    return SplitProposal(first_tokens=cut, first_logits=logits)


def _logits_before(plan: Plan, cut: int) -> Iterator[int]:
    """Logits of each chunk's rows before the cut: its wanted prompt rows, and its last row if that gives a token."""
    first_row = plan.num_decode
    for chunk in plan.chunks:
        stop = chunk.start + min(cut - first_row, chunk.length)
        if stop <= chunk.start:
            return
        prompt = chunk.prompt_rows()
        yield max(min(prompt.stop, stop) - prompt.start, 0) + (chunk.completes and stop == chunk.start + chunk.length)
        first_row += chunk.length
