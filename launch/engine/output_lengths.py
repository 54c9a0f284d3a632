"""How long answers have been lately, and so how much longer one that has got this far will be. Knows no requests and no clock.

A bounded window of the last outputs that ended by themselves. What a sequence that has produced `a` tokens has left is read from
those of the window that were longer than `a` (a sequence that has outlived the short answers is a long one): the median of how much
they had left, since what one sequence exceeds it by another stays below it. Method: the conditional distribution of LightLLM's
Past-Future scheduler (Gong et al., 2025), with the median in place of its random draws, so that all ranks of a DP group come to the
same integers.
"""

from __future__ import annotations

import numpy as np

from moesaic.launch.engine.sequence import Int64Array

WINDOW = 512
"""Outputs that are remembered: some minutes of traffic on one DP rank, so that the estimate follows when the traffic changes."""
MIN_LONGER = 8
"""Of fewer longer outputs nothing is concluded."""
UNKNOWN = -1


class OutputLengths:
    """The last WINDOW lengths."""

    def __init__(self) -> None:
        self._ring: Int64Array = np.zeros(WINDOW, dtype=np.int64)
        self._num_seen = 0
        self._sorted: Int64Array = self._ring[:0]

    def add(self, num_tokens: int) -> None:
        """An output of so many tokens has ended."""
        self._ring[self._num_seen % WINDOW] = num_tokens
        self._num_seen += 1
        self._sorted = np.sort(self._ring[: self._num_seen])

    def remaining(self, produced: Int64Array) -> Int64Array:
        """`produced` int64 [n]: tokens of n running outputs. Returns int64 [n], at least 1: what half of those longer had left at
        most; UNKNOWN where fewer than MIN_LONGER were longer.
        """
        first_longer = np.searchsorted(self._sorted, produced, side="right")
        num_longer = len(self._sorted) - first_longer
        known = num_longer >= MIN_LONGER
        remaining: Int64Array = np.full(len(produced), UNKNOWN, dtype=np.int64)
        median = (first_longer + (num_longer - 1) // 2)[known]
        remaining[known] = self._sorted[median] - produced[known]
        return remaining
