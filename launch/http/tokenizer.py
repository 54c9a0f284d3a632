"""Text to token ids and back, from a checkpoint's tokenizer.json and tokenizer_config.json, without HF transformers.

Knows the files' format; knows no requests. A server without tokenizer files works on token ids alone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from moesaic.launch.http.chat_template import ChatTemplate, find_template

# Longer texts are encoded in a thread (the tokenizer lets go of the interpreter lock), so that streams do not stall.
LONG_TEXT = 8192


class Tokenizer:
    """Encodes and decodes. `chat_template` is None when the checkpoint has none."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, object], template: str | None = None) -> None:
        self._backend = backend
        special = {name: _token_text(settings[name]) for name in settings if name.endswith("_token")}
        self._special_tokens = {name: text for name, text in special.items() if text is not None}
        _add_missing(backend, settings)
        self.special_ids = frozenset(token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special)
        bos = self._special_tokens.get("bos_token")
        self._bos_id = None if bos is None else backend.token_to_id(bos)
        self._add_bos = settings.get("add_bos_token")
        self.chat_template = None if template is None else ChatTemplate(template, self._special_tokens)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        return self._backend

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with `add_special_tokens` a beginning-of-sequence token as the checkpoint's settings say."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if not add_special_tokens or self._bos_id is None:
            return ids
        # `add_bos_token` is applied by transformers' classes and not written into tokenizer.json.
        starts = ids[:1] == [self._bos_id]
        if self._add_bos is True and not starts:
            return [self._bos_id, *ids]
        if self._add_bos is False and starts and not text.startswith(self._special_tokens["bos_token"]):
            return ids[1:]
        return ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if len(text) < LONG_TEXT:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprobs: special tokens by name, pieces of a character as the replacement character."""
        return self.decode([token_id], skip_special_tokens=False)

    def stop_ids(self) -> tuple[int, ...]:
        """The id of `eos_token`, if the files name one."""
        eos = self._special_tokens.get("eos_token")
        found = None if eos is None else self._backend.token_to_id(eos)
        return () if found is None else (found,)


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer in `folder`, or None when it has no tokenizer.json. ValueError names a file that cannot be read."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"cannot read {path}: {error}") from error
    # A prompt must never be cut or padded by a setting left over from training.
    backend.no_truncation()
    backend.no_padding()
    settings = _read_settings(folder / "tokenizer_config.json")
    return Tokenizer(backend, settings, find_template(folder, settings))


def _read_settings(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not hold an object")
    return settings


def _token_text(value: object) -> str | None:
    """A token in tokenizer_config.json is its text or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _add_missing(backend: tokenizers.Tokenizer, settings: Mapping[str, object]) -> None:
    """Added tokens that only tokenizer_config.json knows, when their id is the next free one or already theirs."""
    added = settings.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return
    for token_id, entry in sorted(added.items(), key=lambda item: int(item[0])):
        text = _token_text(entry)
        if text is None or backend.token_to_id(text) is not None or int(token_id) != backend.get_vocab_size():
            continue
        token = tokenizers.AddedToken(text, special=bool(entry.get("special")), normalized=bool(entry.get("normalized")))
        backend.add_tokens([token])
