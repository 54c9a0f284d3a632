"""How a running sequence steps back when memory runs out, and how it goes on where its KV was kept.

Its pages stay cached while there is room, it waits again, nothing is lost. A keeper may keep its KV (`retraction.py`); then it
decodes as soon as it has pages again. Knows no queues: who steps back and when there is room are the caller's.
"""

from __future__ import annotations

from moesaic.launch.engine.retraction import KVKeeper, Restoration
from moesaic.launch.engine.running_memory import RunningMemory
from moesaic.launch.engine.sequence import Sequence


class SteppingBack:
    """`keeper`: None where what is retracted is always computed again."""

    def __init__(self, memory: RunningMemory, page_size: int, keeper: KVKeeper | None) -> None:
        self.num_retracted = 0
        self._memory = memory
        self._page_size = page_size
        self._keeper = keeper
        self._restorations: list[Restoration] = []

    def prepare(self, victim: Sequence, *, keep: bool) -> None:
        """Before the victim's slot and pages are released. All its tokens are known. keep: its KV is worth keeping."""
        table = self._memory.table
        assert table.num_known[victim.slot] == table.num_tokens[victim.slot], "retracted with a token under way"
        assert not self._restorations, "what was to be copied back has been launched"
        self._memory.share(victim)
        if keep and self._keeper is not None:
            victim.kept = self._keeper.keep(self._memory.settled_pages(victim), victim.num_settled)
        self.num_retracted += 1
        self._memory.growth.was_too_low()

    def resume(self, sequence: Sequence) -> int:
        """A sequence whose KV was kept has slot and pages again. Returns its last token, which has no KV yet."""
        kept = sequence.kept
        assert kept is not None and self._keeper is not None
        assert kept.num_tokens == sequence.num_tokens - 1, "all but the last token have KV"
        pages = self._memory.table.page_row(sequence.slot).copy()
        self._restorations.append(self._keeper.restore(kept, pages, sequence.num_settled // self._page_size))
        sequence.kept = None
        sequence.num_settled, sequence.num_computed = kept.num_tokens, sequence.num_tokens
        return int(sequence.tokens[kept.num_tokens])

    def forget(self, sequence: Sequence) -> None:
        """Nobody wants a waiting sequence any more."""
        if sequence.kept is not None and self._keeper is not None:
            self._keeper.forget(sequence.kept)
            sequence.kept = None

    def take_restoration(self) -> Restoration | None:
        """What must be copied back before the next forward, since the last call."""
        parts, self._restorations = self._restorations, []
        return Restoration.of_all(parts)
