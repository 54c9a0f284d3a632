"""The waiting sequences of one DP rank: who goes first. Knows no memory and no running sequences.

Higher priority first, then earlier arrival. The policy "lpm" (longest prefix match, SGLang's) prefers among equal priorities those
of which the prefix cache has most.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from moesaic.attention.prefix_cache import PrefixCache
from moesaic.launch.engine.sequence import Sequence

LPM_WINDOW = 64
"""How many waiting sequences the longest-prefix-match policy looks at; matching costs time."""


class WaitingQueue:
    """`policy` is "fcfs" or "lpm"."""

    def __init__(self, policy: str, cache: PrefixCache) -> None:
        self._policy = policy
        self._cache = cache
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """By precedence, whatever the policy."""
        return iter(self._sequences)

    @property
    def head(self) -> Sequence | None:
        """Who has precedence over all others, whatever the policy."""
        return self._sequences[0] if self._sequences else None

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self._sequences)

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self._sequences, sequence, key=lambda waiting: waiting.precedence)

    def remove(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)

    def admission_order(self) -> list[Sequence]:
        """All of them, as the policy would admit them."""
        if self._policy == "fcfs" or len(self._sequences) == 1:
            return list(self._sequences)
        window = self._sequences[:LPM_WINDOW]
        hits = {
            sequence.rid: self._cache.peek(sequence.tokens[: sequence.num_tokens], sequence.matchable_tokens) for sequence in window
        }
        order = sorted(window, key=lambda sequence: (-sequence.request.priority, -hits[sequence.rid]))
        return order + self._sequences[LPM_WINDOW:]
