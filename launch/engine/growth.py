"""How many tokens running sequences are expected to grow by: what admission leaves room for. Knows no pages and no requests.

Two estimates, the larger counts: a share of what every sequence may still generate, doubled when it was too low (a sequence had to
be sent back) and shrinking slowly while it was not; and a fixed number of tokens per sequence (`--num-reserved-decode-tokens`).
"""

from __future__ import annotations

import numpy as np

from moesaic.launch.engine.sequence import Int64Array

SHARE_START, SHARE_MIN, SHARE_DECAY = 0.4, 0.05, 0.998
HORIZON_TOKENS = 4096


class Growth:
    """`tokens_per_sequence` 0: the share alone counts. The same calls give the same estimates on all ranks of a DP group."""

    def __init__(self, tokens_per_sequence: int = 0) -> None:
        self._per_sequence = tokens_per_sequence
        self._share = SHARE_START

    def expected_tokens(self, remaining: Int64Array) -> int:
        """`remaining` int64 [n]: what each sequence may still generate."""
        by_share = np.minimum(remaining, HORIZON_TOKENS).sum() * self._share
        return max(int(by_share), int(np.minimum(remaining, self._per_sequence).sum()))

    def went_well(self) -> None:
        """A step was launched."""
        self._share = max(self._share * SHARE_DECAY, SHARE_MIN)

    def was_too_low(self) -> None:
        """A sequence had to be sent back."""
        self._share = min(1.0, self._share * 2)
