"""How the attention-TP ranks of a DP group agree which rooms have moved on. Pure.

Their schedulers run the same messages without talking, but transfers end at different times on different ranks. So each rank says
in its step header, for up to `ROOMS_PER_WORD` rooms (the same on all, in the same order), which have moved on and which have
failed; a room moves on when it has on every rank, and fails when it has on any (`protocol.group_state`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

ROOMS_PER_WORD = 31
"""Two bits each in a word of 62 bits, which a header's int64 holds with its sign to spare."""


class Sign(NamedTuple):
    """What a rank sees of a room."""

    moved: bool
    failed: bool


def window(num_rooms: int, turn: int) -> range:
    """The places of the rooms that a word is about, a different window every turn: rooms that are stuck hold up no others."""
    num_windows = -(-num_rooms // ROOMS_PER_WORD) or 1
    start = turn % num_windows * ROOMS_PER_WORD
    return range(start, min(start + ROOMS_PER_WORD, num_rooms))


def rooms_word(signs: Iterable[Sign]) -> int:
    """This rank's word on up to ROOMS_PER_WORD rooms."""
    word = 0
    for place, sign in enumerate(signs):
        assert place < ROOMS_PER_WORD, "more rooms than a word holds"
        word |= (sign.moved | sign.failed << 1) << (2 * place)
    return word


def agree(words: Sequence[int]) -> tuple[list[int], dict[int, int]]:
    """The words of all ranks of a group -> places that have moved on on all, and those that have failed on any with the first such
    rank of the group.
    """
    moved: list[int] = []
    failed: dict[int, int] = {}
    for place in range(ROOMS_PER_WORD):
        bits = [word >> (2 * place) & 0b11 for word in words]
        culprit = next((rank for rank, bit in enumerate(bits) if bit & 0b10), None)
        if culprit is not None:
            failed[place] = culprit
        elif all(bit & 0b01 for bit in bits):
            moved.append(place)
    return moved, failed
