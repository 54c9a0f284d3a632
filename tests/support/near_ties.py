"""Greedy tokens beside the oracle's, where numbers are rounded: a request may leave the oracle's path only at a near-tie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Logits = Callable[[list[int]], Tensor]
"""Token ids -> the oracle's logits fp32 [T, V]."""


def num_near_ties(logits: Logits, prompts: Mapping[int, Sequence[int]], tokens: Mapping[int, Sequence[int]], most: float) -> int:
    """How many requests left the oracle's greedy path at a near-tie: the oracle's own choice has a logit less than `most` above
    theirs. A token that differs elsewhere is an error. `prompts` and `tokens` by request.
    """
    return sum(_left_at_a_tie(logits, rid, list(prompts[rid]), list(said), most) for rid, said in tokens.items())


def _left_at_a_tie(logits: Logits, rid: int, prompt: list[int], said: list[int], most: float) -> bool:
    # What was said up to the first token that differs is the oracle's own path: one forward over all of it tells.
    rows = logits([*prompt, *said])[len(prompt) - 1 : -1]
    for at, (row, token) in enumerate(zip(rows, said, strict=True)):
        best = int(row.argmax())
        if best != token:
            gap = float(row[best] - row[token])
            assert gap < most, f"request {rid}, token {at}: {token} instead of {best}, whose logit is {gap:.3f} higher"
            return True
    return False
