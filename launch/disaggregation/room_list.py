"""The rooms of one rank in order of arrival, each with the stage that its DP group has agreed on, and how the group agrees.

Knows no transfers and no scheduler: whoever owns a room says what it sees of it. A stage changes by the group's word or by what all
ranks of the group do alike, so it is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from moesaic.launch.disaggregation.agreement import Sign, agree, rooms_word, window
from moesaic.launch.engine.messages import GenerateRequest


@dataclass(eq=False, kw_only=True)
class Entry:
    """A request with its room."""

    request: GenerateRequest
    stage: Enum

    @property
    def rid(self) -> int:
        return self.request.rid


EntryT = TypeVar("EntryT", bound=Entry)


@dataclass(frozen=True)
class Verdict(Generic[EntryT]):
    """What the group has agreed on: the room has moved on from its stage, or `failed_rank` (in the group) has failed."""

    entry: EntryT
    failed_rank: int | None = None


class RoomList(Generic[EntryT]):
    """`see`: what this rank sees of a room in its stage."""

    def __init__(self, see: Callable[[EntryT], Sign]) -> None:
        self._see = see
        self._entries: dict[int, EntryT] = {}
        self._turn = 0
        self._asked: list[tuple[EntryT, Enum]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, rid: int) -> EntryT | None:
        return self._entries.get(rid)

    def add(self, entry: EntryT) -> None:
        self._entries[entry.rid] = entry

    def remove(self, entry: EntryT) -> None:
        del self._entries[entry.rid]

    def in_stage(self, *stages: Enum) -> list[EntryT]:
        """In order of arrival."""
        return [entry for entry in self._entries.values() if entry.stage in stages]

    def word(self) -> int:
        """This rank's word in this step."""
        if not self._entries:
            return 0
        entries = list(self._entries.values())
        self._asked = [(entries[place], entries[place].stage) for place in window(len(entries), self._turn)]
        self._turn += 1
        return rooms_word(self._see(entry) for entry, _ in self._asked)

    def verdicts(self, words: Sequence[int]) -> Iterator[Verdict[EntryT]]:
        """What the words of the step come to. Rooms that have ended or moved on since `word` are passed over."""
        asked, self._asked = self._asked, []
        moved, failed = agree(words) if asked else ([], {})
        for place, (entry, stage) in enumerate(asked):
            if self._entries.get(entry.rid) is not entry or entry.stage is not stage:
                continue
            if place in failed:
                yield Verdict(entry, failed[place])
            elif place in moved:
                yield Verdict(entry)
