"""Finding stop strings in text that arrives in pieces, letting out only what can be part of none.

Knuth-Morris-Pratt, one automaton per stop string: constant work per character and stop string, however long they are.
Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Automaton:
    """`state` is the length of the longest beginning of `stop` that the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        self._fallback = _failure_table(stop)

    def step(self, character: str) -> bool:
        """Take one character; True when the text now ends with the whole stop string (after which it must not be used)."""
        stop, state = self.stop, self.state
        while state and stop[state] != character:
            state = self._fallback[state - 1]
        if stop[state] == character:
            state += 1
        self.state = state
        return state == len(stop)


def _failure_table(stop: str) -> list[int]:
    """table[i]: length of the longest proper beginning of stop[:i+1] that is also its end."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table


class StopStrings:
    """The stop that ends first wins; of those that end together, the longest. `matched` is it, or None so far."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """The text that may go out now: up to the stop string if one is complete, else up to a possible beginning of
        one.
        """
        if self.matched is not None:
            return ""
        if not self._automata:
            return text
        for index, character in enumerate(text):
            complete = [automaton.stop for automaton in self._automata if automaton.step(character)]
            if complete:
                self.matched = max(complete, key=len)
                seen = self._held + text[: index + 1]
                self._held = ""
                return seen[: len(seen) - len(self.matched)]
        seen = self._held + text
        sure = len(seen) - max(automaton.state for automaton in self._automata)
        self._held = seen[sure:]
        return seen[:sure]

    def end(self) -> str:
        """What was held back for a stop string that never came."""
        held, self._held = self._held, ""
        return held
