"""Who runs on one DP rank: the slots of those that decode, of those that are placed, and the one whose prompt is computed in part.

Placed is who has slot and pages, but is in no step: its prompt is computed elsewhere. Knows no memory and no queues.
"""

from __future__ import annotations

import numpy as np

from moesaic.launch.engine.sequence import Int64Array, Sequence, SequenceTable


class RunningSet:
    """Slots int64, in the order in which they came. `partial` is the caller's to set; `discard` empties it."""

    def __init__(self, table: SequenceTable) -> None:
        self.partial: Sequence | None = None
        self._table = table
        self._decoding: Int64Array = np.empty(0, dtype=np.int64)
        self._placed: Int64Array = np.empty(0, dtype=np.int64)

    def decode(self, slots: Int64Array) -> None:
        """These slots decode from now on; they may have been placed."""
        if len(self._placed):
            self._placed = self._placed[~np.isin(self._placed, slots)]
        self._decoding = np.append(self._decoding, slots)

    def place(self, slot: int) -> None:
        self._placed = np.append(self._placed, slot)

    def discard(self, sequence: Sequence) -> None:
        """It gives back its slot."""
        if self.partial is sequence:
            self.partial = None
        else:
            self._decoding = self._decoding[self._decoding != sequence.slot]
            self._placed = self._placed[self._placed != sequence.slot]

    def ready(self) -> Int64Array:
        """Slots that can decode: those whose launched tokens reach their maximum only wait for the last one's value."""
        slots = self._decoding
        return slots[self._table.num_tokens[slots] < self._table.max_tokens[slots]]

    def growing(self) -> Int64Array:
        """Slots of those that will need more pages."""
        return np.concatenate([self._decoding, self._placed])

    def last(self) -> Sequence:
        """Who goes last of those that take part in steps."""
        running = [self._table.sequence(slot) for slot in self._decoding.tolist()]
        if self.partial is not None:
            running.append(self.partial)
        assert len(running) > 1 or len(self._placed), "one sequence alone always fits: check() refuses what can't"
        return max(running, key=lambda sequence: sequence.precedence)
