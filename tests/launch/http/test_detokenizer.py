"""Incremental detokenization: whatever the tokens and wherever the borders, the pieces are the whole."""

from __future__ import annotations

import time

import pytest
import tokenizers
from http_server import byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from moesaic.launch.http.detokenizer import Detokenizer
from moesaic.launch.http.stop_strings import StopStrings
from moesaic.launch.http.token_text import ByteLevelText, WindowText, make_token_text
from moesaic.launch.http.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer(byte_level_tokenizer(), {"bos_token": "<bos>"})
IDS = st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=60)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)


def _byte_fallback() -> Tokenizer:
    """As SentencePiece models have it: words with a leading mark, bytes as <0xNN>."""
    words = ["<unk>", "▁hello", "▁world", "lo", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, {})


BYTE_FALLBACK = _byte_fallback()


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    text = make_token_text(tokenizer, skip)
    return [*(text.add(token_id) for token_id in ids), text.end()]


@given(IDS, st.booleans())
def test_random_tokens_in_pieces_are_their_text(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids, skip)) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(TEXTS)
def test_no_piece_of_a_character_comes_out(text: str) -> None:
    found = pieces(BYTE_LEVEL, BYTE_LEVEL.encode(text, add_special_tokens=False))
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@given(TEXTS, st.lists(st.sampled_from([1, 2, 3, 4]), max_size=5))
def test_tokenizers_with_byte_fallback(text: str, words: list[int]) -> None:
    ids = [1, *(5 + byte for byte in text.encode()), *words]
    assert "".join(pieces(BYTE_FALLBACK, ids)) == BYTE_FALLBACK.decode(ids)


def test_each_decoder_has_its_way() -> None:
    assert isinstance(make_token_text(BYTE_LEVEL, True), ByteLevelText)
    assert isinstance(make_token_text(BYTE_FALLBACK, True), WindowText)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
def test_broken_bytes_for_ever_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    start = tokenizer.backend.token_to_id("<0xF0>" if tokenizer is BYTE_FALLBACK else "ð")
    text = make_token_text(tokenizer, True)
    assert any(text.add(start) for _ in range(40))


def test_work_per_token_does_not_grow() -> None:
    def seconds(count: int) -> float:
        detokenizer = Detokenizer(BYTE_LEVEL, ["never this", "nor that"])
        started = time.process_time()
        for token_id in range(count):
            detokenizer.add([token_id % 300 + 3])
        return time.process_time() - started

    seconds(1000)
    assert seconds(16_000) < 16 * seconds(2_000)


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The stop that ends first, of those the longest: found by looking at every end."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=3, unique=True),
    st.lists(st.integers(1, 6), max_size=40),
)
@settings(max_examples=200)
def test_stop_strings_wherever_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopStrings(stops)
    expected, stop = reference(text, stops)
    out, place = "", 0
    for cut in [*cuts, len(text)]:
        out += matcher.add(text[place : place + cut])
        assert expected.startswith(out), "text went out that belongs to a stop string"
        place += cut
    assert (out + matcher.end(), matcher.matched) == (expected, stop)


def test_text_that_cannot_begin_a_stop_goes_out_at_once() -> None:
    matcher = StopStrings(["###"])
    assert matcher.add("hello #") == "hello "
    assert matcher.add("x") == "#x"


@given(TEXTS, st.lists(st.text(min_size=1, max_size=3), max_size=2), st.booleans())
def test_detokenizer_trims_at_the_stop(text: str, stops: list[str], keep: bool) -> None:
    stops = [stop for stop in stops if stop.encode(errors="ignore").decode() == stop]
    detokenizer = Detokenizer(BYTE_LEVEL, stops, no_stop_trim=keep)
    out = ""
    for token_id in BYTE_LEVEL.encode(text, add_special_tokens=False):
        piece, used = detokenizer.add([token_id])
        out += piece
        assert used == 1
        if detokenizer.matched is not None:
            break
    if detokenizer.matched is None:
        out += detokenizer.end()
    expected, stop = reference(text, stops)
    assert (out, detokenizer.matched) == (expected + (stop or "" if keep else ""), stop)


def test_a_stop_in_the_middle_of_a_step_says_how_many_tokens_count() -> None:
    ids = BYTE_LEVEL.encode("abcdef", add_special_tokens=False)
    text, used = Detokenizer(BYTE_LEVEL, ["c"]).add(ids)
    assert (text, used) == ("ab", 3)


def test_min_tokens_come_before_any_stop() -> None:
    ids = BYTE_LEVEL.encode("aaaa", add_special_tokens=False)
    detokenizer = Detokenizer(BYTE_LEVEL, ["a"], min_tokens=3)
    assert detokenizer.add(ids) == ("aaa", 4)
    assert detokenizer.matched == "a"
