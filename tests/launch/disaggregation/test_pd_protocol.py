"""States, rooms, layouts, frames and agreement: what the two sides rely on, without a socket."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_ranks import make_layout

from moesaic.launch.disaggregation.agreement import ROOMS_PER_WORD, Sign, agree, rooms_word, window
from moesaic.launch.disaggregation.frames import HEADER_BYTES, FrameError, FrameReader, FrameWriter
from moesaic.launch.disaggregation.handover import Handover, decode_handover, encode_handover
from moesaic.launch.disaggregation.protocol import (
    MAX_ROOM,
    KVLayout,
    LayoutMismatchError,
    RoomError,
    TransferState,
    check_same_kv,
    group_state,
)
from moesaic.launch.disaggregation.rooms import RoomBook, RoomProgress
from moesaic.launch.engine.messages import TokenLogprobs

FAILED, WAITING, TRANSFERRING, SUCCESS = (
    TransferState.FAILED,
    TransferState.WAITING,
    TransferState.TRANSFERRING,
    TransferState.SUCCESS,
)
states = st.sampled_from(TransferState)


def test_states_have_the_numbers_of_the_contract() -> None:
    assert [state.value for state in TransferState] == [0, 1, 2, 3, 4]
    assert group_state([SUCCESS, TRANSFERRING, SUCCESS]) is TRANSFERRING
    assert group_state([SUCCESS, FAILED]) is FAILED


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("page_size", 64, "page size differs: prefill has 16, decode has 64; start both with the same --page-size"),
        ("kv_dtype", "bfloat16", "KV dtype differs: prefill has float32, decode has bfloat16"),
        ("model_id", "other", "model differs: prefill has tiny, decode has other"),
        ("bytes_per_token", 1, "KV bytes per token differs: prefill has 48, decode has 1"),
    ],
)
def test_kv_that_does_not_fit_is_refused_with_both_values(field: str, value: object, words: str) -> None:
    with pytest.raises(LayoutMismatchError) as caught:
        check_same_kv(make_layout(), msgspec.structs.replace(make_layout(), **{field: value}))
    assert words in str(caught.value)


def test_parallel_sizes_may_differ() -> None:
    check_same_kv(make_layout(8, 2), KVLayout(**{**msgspec.structs.asdict(make_layout()), "tp_size": 4, "ep_size": 2}))


def test_a_room_is_used_once() -> None:
    book = RoomBook()
    book.claim(7)
    with pytest.raises(RoomError, match="bootstrap_room 7 is in use by another request"):
        book.claim(7)
    book.release(7, "handed over")
    assert (book.end_of(7), book.end_of(8)) == ("handed over", None)
    with pytest.raises(RoomError, match="bootstrap_room 7 was used before"):
        book.claim(7)
    book.claim(0)
    book.claim(MAX_ROOM)
    for wrong in (-1, MAX_ROOM + 1):
        with pytest.raises(RoomError, match="must be between 0 and"):
            book.claim(wrong)


def test_giving_up_counts_at_once_and_keeps_its_reason() -> None:
    progress = RoomProgress(5, "decode instance d0 rank 1")
    progress.advance(WAITING)

    assert progress.give_up("the client has gone")
    assert progress.state is FAILED
    assert not progress.ended
    progress.fail("lost", "the connection broke meanwhile")

    assert str(progress.failure) == "decode instance d0 rank 1, room 5, in state waiting: the client has gone"
    assert progress.failure is not None and progress.failure.kind == "aborted"
    assert not progress.give_up("again")


def frames_of(*payloads: bytes) -> list[bytes]:
    writer = FrameWriter()
    return [writer.frame(payload) for payload in payloads]


def read(reader: FrameReader, frame: bytes) -> bytes:
    length = reader.header(frame[:HEADER_BYTES])
    assert length == len(frame) - HEADER_BYTES
    return reader.payload(frame[HEADER_BYTES:])


def test_frames_arrive_as_they_were_sent() -> None:
    reader = FrameReader()
    payloads = [b"", b"one", bytes(1000)]

    assert [read(reader, frame) for frame in frames_of(*payloads)] == payloads


def test_a_frame_that_comes_twice_is_noticed() -> None:
    first, second = frames_of(b"one", b"two")
    reader = FrameReader()
    read(reader, first)
    with pytest.raises(FrameError, match="frame 0 came again, expected frame 1"):
        read(reader, first)
    with pytest.raises(FrameError, match="frame 0 is missing, frame 1 came instead"):
        read(FrameReader(), second)


def test_bytes_that_are_no_frame_or_changed_on_the_way_are_noticed() -> None:
    (frame,) = frames_of(b"payload")
    with pytest.raises(FrameError, match="no frame: it begins with b'GET "):
        read(FrameReader(), b"GET / HTTP/1.1\r\n\r\n......")
    with pytest.raises(FrameError, match="arrived changed"):
        read(FrameReader(), frame[:-1] + b"!")
    with pytest.raises(FrameError, match="at most"):
        FrameReader().header(frame[:4] + b"\xff\xff\xff\xff" + frame[8:HEADER_BYTES])


@given(st.lists(st.lists(states, max_size=ROOMS_PER_WORD), min_size=1, max_size=4), st.sampled_from([WAITING, SUCCESS]))
def test_ranks_agree_on_what_all_have_reached_and_any_has_failed(ranks: list[list[TransferState]], wanted: TransferState) -> None:
    num_rooms = min(map(len, ranks))
    queues = [rank[:num_rooms] for rank in ranks]
    words = [rooms_word(Sign(state is not FAILED and state >= wanted, state is FAILED) for state in queue) for queue in queues]
    moved, failed = agree(words)

    assert all(0 <= word < 1 << 62 for word in words)
    seen = [group_state(states) for states in zip(*queues, strict=True)]
    assert failed == {
        place: next(rank for rank, queue in enumerate(queues) if queue[place] is FAILED)
        for place, state in enumerate(seen)
        if state is FAILED
    }
    assert moved == [place for place, state in enumerate(seen) if state is not FAILED and state >= wanted]


@given(st.integers(0, 200))
def test_every_room_has_its_turn_however_many_there_are(num_rooms: int) -> None:
    windows = [window(num_rooms, turn) for turn in range(7, 7 + max(1, -(-num_rooms // ROOMS_PER_WORD)))]

    assert sorted(place for places in windows for place in places) == list(range(num_rooms))
    assert all(len(places) <= ROOMS_PER_WORD for places in windows)


def test_a_handover_carries_the_first_token_with_all_that_belongs_to_it() -> None:
    top = [(3, -0.1), (4, -2.5)]
    handover = Handover(
        token_id=3,
        cached_tokens=32,
        logprobs=TokenLogprobs(token_id=3, logprob=-0.1, top=top),
        prompt_logprobs=(TokenLogprobs(token_id=9, logprob=None), TokenLogprobs(token_id=8, logprob=-1.0)),
        hidden_state=bytes(range(8)),
        hidden_dtype="float32",
    )

    assert decode_handover(encode_handover(handover)) == handover
    with pytest.raises(ValueError, match="token_id"):
        decode_handover(b"\x80")
