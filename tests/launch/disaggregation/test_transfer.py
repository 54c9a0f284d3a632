"""Rooms that go well: what prefill sent lies in decode's pages, for every transport and any two layouts."""

from __future__ import annotations

import time

import numpy as np
import pytest
from pd_ranks import (
    NUM_LAYERS,
    NUM_PAGES,
    Pair,
    make_layout,
    next_room,
    nothing_left,
    running_pair,
    same_pages,
    wait_for,
    wait_for_state,
)

from moesaic.launch.disaggregation.backends import BackendName, missing_reason
from moesaic.launch.disaggregation.protocol import WARMUP_HOST, RoomError, TransferState
from moesaic.launch.disaggregation.warmup import WarmupReceiver, WarmupSender

WAITING, TRANSFERRING, SUCCESS = TransferState.WAITING, TransferState.TRANSFERRING, TransferState.SUCCESS


def backend_parameter(name: BackendName) -> object:
    reason = missing_reason(name)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


every_backend = pytest.mark.parametrize("backend", [backend_parameter(name) for name in ("fake", "tcp", "nixl", "mooncake")])


@every_backend
def test_a_prompt_in_three_chunks_arrives_whole(backend: BackendName) -> None:
    with running_pair(backend) as pair:
        (prefill,), (decode,) = pair.prefill, pair.decode
        room = next_room()
        sender, receiver = prefill.sender(room), decode.receiver(room)
        untouched = [pool.copy() for pool in decode.pools]

        wait_for_state([receiver], WAITING)
        assert sender.state is TransferState.BOOTSTRAPPING, "decode has no pages for it yet"
        receiver.receive([50, 51, 52, 10, 11, 7, 90])
        wait_for_state([sender], WAITING)
        sender.send([3, 4, 5])
        wait_for_state([sender, receiver], TRANSFERRING)
        wait_for(lambda: receiver.stats.num_pages == 3)  # while later chunks are not computed yet
        assert receiver.metadata == b""
        sender.send([])
        sender.send([20, 21])
        sender.send([22, 60])
        sender.finish(b"the first token")
        wait_for_state([sender, receiver], SUCCESS)

        assert receiver.metadata == b"the first token"
        assert same_pages(prefill, [3, 4, 5, 20, 21, 22, 60], decode, [50, 51, 52, 10, 11, 7, 90])
        others = [page for page in range(NUM_PAGES) if page not in (50, 51, 52, 10, 11, 7, 90)]
        assert all(np.array_equal(now[others], then[others]) for now, then in zip(decode.pools, untouched, strict=True))
        stats = receiver.stats
        assert (stats.num_runs, stats.num_pages) == (4, 7), "one run of pages is one message"
        assert stats.num_bytes == 7 * decode.transfer.memory.page_bytes
        assert 0 < stats.seconds < 10
        assert receiver.quiet
        wait_for(lambda: nothing_left(pair))


@every_backend
def test_many_rooms_are_in_flight_at_once(backend: BackendName) -> None:
    with running_pair(backend, checksum=backend != "nixl") as pair:
        (prefill,), (decode,) = pair.prefill, pair.decode
        rooms = [next_room() for _ in range(12)]
        sources = {room: list(range(8 * i, 8 * i + 8)) for i, room in enumerate(rooms)}
        targets = {room: list(range(8 * i, 8 * i + 8)) for i, room in enumerate(reversed(rooms))}
        receivers = {room: decode.receiver(room) for room in rooms}  # decode is first, prefill hears of the rooms later
        for room in rooms:
            receivers[room].receive(targets[room])
        senders = {room: prefill.sender(room) for room in rooms}
        for half in (slice(0, 5), slice(5, 8)):
            for room in rooms:
                senders[room].send(sources[room][half])
        for room in rooms:
            senders[room].finish(f"token of {room}".encode())
        wait_for_state([*senders.values(), *receivers.values()], SUCCESS)

        for room in rooms:
            assert same_pages(prefill, sources[room], decode, targets[room])
            assert receivers[room].metadata == f"token of {room}".encode()
        wait_for(lambda: nothing_left(pair))


def hand_over(pair: Pair, room: int, num_pages: int, num_cached: list[int], dp_rank: int | None = None) -> list[int]:
    """One room from prefill's DP group to all ranks of decode's DP group 0; pages fetched per rank. Pages 0, 1, ... on both sides.

    num_cached: pages that each decode rank has already.
    """
    prefill_layout, decode_layout = pair.prefill[0].transfer.layout, pair.decode[0].transfer.rank.layout
    group = room % prefill_layout.dp_size if dp_rank is None else dp_rank
    size = prefill_layout.attn_tp_size
    sources = pair.prefill[group * size : (group + 1) * size]
    targets = pair.decode[: decode_layout.attn_tp_size]
    receivers = [rank.receiver(room, dp_rank) for rank in targets]
    for receiver, cached in zip(receivers, num_cached, strict=True):
        receiver.receive(range(cached, num_pages), first_index=cached)
    senders = [rank.sender(room) for rank in sources]
    wait_for_state(senders, WAITING)
    for sender in senders:
        sender.send(range(num_pages // 2))
        sender.send(range(num_pages // 2, num_pages))
        sender.finish(b"")
    wait_for_state([*senders, *receivers], SUCCESS)
    for target, cached in zip(targets, num_cached, strict=True):
        assert same_pages(sources[0], range(cached, num_pages), target, range(cached, num_pages))
    return [receiver.stats.num_pages for receiver in receivers]


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [((1, 1), (1, 1)), ((2, 2), (4, 4)), ((2, 1), (1, 1)), ((4, 1), (2, 1)), ((1, 1), (2, 1)), ((2, 1), (4, 1)), ((3, 1), (2, 1))],
    ids=lambda sizes: f"tp{sizes[0]}dp{sizes[1]}",
)
def test_layouts_may_differ_and_each_rank_fetches_all_it_lacks_once(prefill: tuple[int, int], decode: tuple[int, int]) -> None:
    """(tp, dp) on both sides; the stats count what was fetched, and every rank has the right bytes."""
    with running_pair(prefill_layout=make_layout(*prefill), decode_layout=make_layout(*decode)) as pair:
        size = pair.decode[0].transfer.rank.layout.attn_tp_size

        assert hand_over(pair, next_room(), 41, [0] * size) == [41] * size
        cached = [7 + rank for rank in range(size)]
        assert hand_over(pair, next_room(), 30, cached) == [30 - own for own in cached]
        wait_for(lambda: nothing_left(pair))


def test_a_request_may_name_its_dp_rank() -> None:
    with running_pair(prefill_layout=make_layout(2, 2)) as pair:
        room = next_room()
        assert hand_over(pair, room, 5, [0], dp_rank=1 - room % 2) == [5]


def test_what_decode_has_is_not_sent() -> None:
    """A prefix kept on decode: only the rest travels; with nothing left to send, the first token still does."""
    with running_pair() as pair:
        assert hand_over(pair, next_room(), 20, [20]) == [0]


def test_checked_pages_are_right_or_the_room_fails() -> None:
    with running_pair("fake", checksum=True) as pair:
        (prefill,), (decode,) = pair.prefill, pair.decode
        decode.backend.held = True  # type: ignore[attr-defined]
        good, bad = next_room(), next_room()
        receivers = [decode.receiver(good), decode.receiver(bad)]
        for receiver, page in zip(receivers, (1, 2), strict=True):
            receiver.receive([page])
        senders = [prefill.sender(good), prefill.sender(bad)]
        for sender, page in zip(senders, (1, 2), strict=True):
            sender.send([page])
            sender.finish(b"")
        wait_for(lambda: len(decode.backend.reads) == 2)  # type: ignore[attr-defined]
        prefill.pools[NUM_LAYERS - 1][2, -1] ^= 1  # one bit on its way
        decode.backend.release()  # type: ignore[attr-defined]

        wait_for_state([receivers[0], senders[0]], SUCCESS)
        wait_for_state([receivers[1], senders[1]], TransferState.FAILED)
        failure = receivers[1].failure
        assert failure is not None
        assert failure.kind == "corrupt"
        assert "page 2 arrived changed: checksum" in str(failure)


def test_warm_up_needs_no_other_side() -> None:
    with running_pair() as pair:
        (prefill,), (decode,) = pair.prefill, pair.decode
        sender = prefill.transfer.sender(1, WARMUP_HOST)
        receiver = decode.transfer.receiver(1, WARMUP_HOST, 8998)
        assert isinstance(sender, WarmupSender)
        assert isinstance(receiver, WarmupReceiver)
        assert (sender.state, receiver.state) == (WAITING, WAITING)
        sender.send([1, 2])
        sender.finish(b"")
        receiver.receive([1, 2])

        assert (sender.state, receiver.state, receiver.quiet) == (SUCCESS, SUCCESS, True)
        prefill.transfer.sender(1, WARMUP_HOST).abort("warm-up rooms may repeat and be given up")


def test_no_call_waits() -> None:
    """The engine's thread never stands still for a transfer, whatever the other side does."""
    with running_pair("fake") as pair:
        (prefill,), (decode,) = pair.prefill, pair.decode
        decode.backend.held = True  # type: ignore[attr-defined]
        rooms = [next_room() for _ in range(50)]
        began = time.monotonic()
        for room in rooms:
            sender, receiver = prefill.sender(room), decode.receiver(room)
            receiver.receive([0])
            sender.send([0])
            sender.finish(b"")
            assert not sender.state.final
            assert not receiver.quiet
        elapsed = time.monotonic() - began

        assert elapsed < 1.0, "50 rooms, nine calls each"
        with pytest.raises(RoomError):
            decode.receiver(rooms[0])
