"""Token ids, one after the other, to text: only whole characters come out, and together they are the text of all ids.

Two ways. Byte-level tokenizers (DeepSeek, Kimi, Qwen, GPT) map every token to bytes: exact, and constant work per
token. For any other decoder a sliding window is decoded again until its end is a whole character. Knows no stops and no
requests.
"""

from __future__ import annotations

import codecs
import json
from typing import Protocol

from moesaic.launch.http.tokenizer import Tokenizer

# A character has at most four bytes, so a window this long that still ends in a broken one is broken, not incomplete.
MAX_HELD_TOKENS = 16
REPLACEMENT = "\ufffd"


class TokenText(Protocol):
    """Text of a growing sequence of tokens."""

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty for a piece of a character."""

    def end(self) -> str:
        """What is left: an incomplete character as the replacement character."""


def make_token_text(tokenizer: Tokenizer, skip_special_tokens: bool) -> TokenText:
    if is_byte_level(tokenizer):
        return ByteLevelText(tokenizer, skip_special_tokens)
    return WindowText(tokenizer, skip_special_tokens)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the decoder is ByteLevel alone, so that tokens are bytes in disguise."""
    decoder = tokenizer.backend.decoder
    return decoder is not None and json.loads(decoder.__getstate__()).get("type") == "ByteLevel"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's bijection: printable Latin-1 bytes stand for themselves, the other 68 for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTES = _byte_alphabet()


def token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token. Added tokens may hold other characters: those stand for themselves."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()


class ByteLevelText:
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._backend = tokenizer.backend
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        token = None if token_id in self._skipped else self._backend.id_to_token(token_id)
        return "" if token is None else self._decoder.decode(token_bytes(token))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowText:
    """Decodes `held` tokens together with the ones before them (`context`), whose presence decides about leading
    spaces.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._held: list[int] = []

    def add(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._new_text()
        if (not text or text.endswith(REPLACEMENT)) and len(self._held) < MAX_HELD_TOKENS:
            return ""
        self._context, self._held = self._held, []
        return text

    def end(self) -> str:
        text = self._new_text()
        self._context, self._held = self._held, []
        return text

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._held)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
