"""Incremental detokenization of one sequence: token ids in, text that may be sent out, stop strings found on the way.

Puts token_text and stop_strings together. Knows no requests and no messages.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.launch.http.stop_strings import StopStrings
from moesaic.launch.http.token_text import make_token_text
from moesaic.launch.http.tokenizer import Tokenizer


class Detokenizer:
    """Text of one sequence. After `add` or `end`, `matched` is the stop string that was found, or None.

    `min_tokens`: stop strings are not looked for in the text of the first so many tokens. With `no_stop_trim` the stop
    string stays at the end of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        no_stop_trim: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._text = make_token_text(tokenizer, skip_special_tokens)
        self._stops = StopStrings(stops)
        self._no_stop_trim = no_stop_trim
        self._unchecked = min_tokens

    @property
    def matched(self) -> str | None:
        return self._stops.matched

    def add(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """The text to send now, and how many of `token_ids` were used: all, or up to the one that completes a stop."""
        parts: list[str] = []
        for used, token_id in enumerate(token_ids, start=1):
            text = self._text.add(token_id)
            if self._unchecked > 0:
                self._unchecked -= 1
                parts.append(text)
                continue
            parts.append(self._stops.add(text))
            if self.matched is not None:
                return self._stopped(parts), used
        return "".join(parts), len(token_ids)

    def end(self) -> str:
        """The rest of the text, when the sequence has ended for another reason than a stop string."""
        rest = self._stops.add(self._text.end())
        if self.matched is not None:
            return self._stopped([rest])
        return rest + self._stops.end()

    def _stopped(self, parts: list[str]) -> str:
        return "".join([*parts, self.matched]) if self._no_stop_trim and self.matched else "".join(parts)
