"""How many tokens running sequences are expected to grow by: what admission leaves room for. Knows no pages and no requests.

Without a bound (one server for both phases): a share of what every sequence may still generate, doubled when it was too low (a
sequence had to be sent back) and shrinking slowly while it was not: SGLang's new_token_ratio. A mistake costs a prefill here.

With a bound (`--num-reserved-decode-tokens`, decode instances), SGLang keeps that many tokens for every running request, always.
Here it is the most that is kept for one: less where it may generate less, or where answers have been shorter lately
(`output_lengths.py`). And sequences that end give their memory back while others still grow: what counts is the moment at which
most is needed, not the sum of all growth (LightLLM's Past-Future scheduler, Gong et al., 2025). Estimates that were too low are
doubled, up to the bound, and come back slowly. `benchmarks/bench_admission.py` compares the two.
"""

from __future__ import annotations

import numpy as np

from moesaic.launch.engine.output_lengths import UNKNOWN, OutputLengths
from moesaic.launch.engine.sequence import Int64Array

SHARE_START, SHARE_MIN, SHARE_DECAY = 0.4, 0.05, 0.998
HORIZON_TOKENS = 4096
CAUTION_MAX, CAUTION_DECAY = 16.0, 0.998


class Growth:
    """`most_tokens`: the bound, 0 for none. The same calls give the same estimates on all ranks of a DP group."""

    def __init__(self, most_tokens: int = 0) -> None:
        self._most_tokens = most_tokens
        self._share = SHARE_START
        self._caution = 1.0
        self._lengths = OutputLengths()

    def expected_tokens(self, remaining: Int64Array, produced: Int64Array, held: Int64Array) -> int:
        """Of each sequence, int64 [n]: what it may still generate, what it has generated, and the tokens of KV that it gives back
        at its end.
        """
        if not self._most_tokens:
            return int(np.minimum(remaining, HORIZON_TOKENS).sum() * self._share)
        bound = np.minimum(remaining, self._most_tokens)
        estimate = self._lengths.remaining(produced)
        likely = np.minimum((estimate * self._caution).astype(np.int64), bound)
        return peak_growth(np.where(estimate == UNKNOWN, bound, likely), held)

    def ended(self, num_tokens: int) -> None:
        """A sequence has ended by itself after it has generated so many tokens."""
        if self._most_tokens:
            self._lengths.add(num_tokens)

    def went_well(self) -> None:
        """A step was launched."""
        self._share = max(self._share * SHARE_DECAY, SHARE_MIN)
        self._caution = max(self._caution * CAUTION_DECAY, 1.0)

    def was_too_low(self) -> None:
        """A sequence had to be sent back."""
        self._share = min(1.0, self._share * 2)
        self._caution = min(self._caution * 2, CAUTION_MAX)


def peak_growth(growth: Int64Array, held: Int64Array) -> int:
    """The most tokens beyond those held now that sequences need at any time, all growing by a token per step.

    growth, held int64 [n]: how many tokens each grows by until it ends, and how many it holds now and then gives back.
    """
    order = np.argsort(-growth, kind="stable")
    growth, kept = growth[order], np.cumsum(held[order])
    # When the k-th longest ends, the k - 1 longer ones have grown as far as it has, and all shorter ones have gone.
    needed = growth * np.arange(1, len(growth) + 1) - (int(held.sum()) - kept)
    return max(0, int(needed.max(initial=0)))
