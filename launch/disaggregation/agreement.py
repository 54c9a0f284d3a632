"""How the attention-TP ranks of a DP group agree which rooms have moved on. Pure.

Their schedulers run the same messages without talking, but transfers end at different times on different ranks. So each rank says
in its step header, for the first `ROOMS_PER_WORD` rooms of a queue (whose order is the same on all), which have moved on and which
have failed; a room moves on when it has on every rank, and fails when it has on any (`protocol.group_state`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moesaic.launch.disaggregation.protocol import TransferState

ROOMS_PER_WORD = 31
"""Two bits each in a word of 62 bits, which a header's int64 holds with its sign to spare."""


def queue_word(states: Iterable[TransferState], wanted: TransferState) -> int:
    """This rank's word on a queue whose rooms wait for the state `wanted`."""
    word = 0
    for place, state in zip(range(ROOMS_PER_WORD), states, strict=False):
        moved = state is not TransferState.FAILED and state >= wanted
        word |= (moved | (state is TransferState.FAILED) << 1) << (2 * place)
    return word


def agree(words: Sequence[int]) -> tuple[list[int], list[int]]:
    """The words of all ranks of a group -> places in the queue that have moved on on all, and that have failed on any."""
    moved, failed = [], []
    for place in range(ROOMS_PER_WORD):
        bits = [word >> (2 * place) & 0b11 for word in words]
        if any(bit & 0b10 for bit in bits):
            failed.append(place)
        elif all(bit & 0b01 for bit in bits):
            moved.append(place)
    return moved, failed
