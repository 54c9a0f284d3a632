"""Rooms that go wrong in one process: aborts, deadlines, second users, strangers, and pages that are not quiet."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from live_server import free_port
from pd_ranks import (
    NUM_PAGES,
    Pair,
    make_layout,
    make_pools,
    next_room,
    nothing_left,
    running_pair,
    same_pages,
    start_decode_rank,
    start_prefill_rank,
    wait_for,
    wait_for_state,
)

from moesaic.attention.page_allocator import PageAllocator
from moesaic.launch.disaggregation.bootstrap import BootstrapServer
from moesaic.launch.disaggregation.fake import FakeBackend
from moesaic.launch.disaggregation.frames import FrameWriter
from moesaic.launch.disaggregation.layout import PageRun
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.protocol import (
    PROTOCOL_VERSION,
    Deadlines,
    Hello,
    RoomError,
    TransferState,
    encoder,
)
from moesaic.launch.disaggregation.receiver_room import ReceiverRoom
from moesaic.launch.disaggregation.room_reads import Fetch, RoomReads
from moesaic.launch.disaggregation.sender_room import SenderRoom
from moesaic.launch.disaggregation.tcp import TcpBackend
from moesaic.launch.disaggregation.tcp_read import TcpRead
from moesaic.launch.disaggregation.tcp_serve import PageServer

BOOTSTRAPPING, WAITING, TRANSFERRING, SUCCESS, FAILED = (
    TransferState.BOOTSTRAPPING,
    TransferState.WAITING,
    TransferState.TRANSFERRING,
    TransferState.SUCCESS,
    TransferState.FAILED,
)


@contextlib.contextmanager
def held_pair(**options: Deadlines) -> Iterator[tuple[Pair, FakeBackend]]:
    """A pair whose transfers wait until the test releases them."""
    with running_pair("fake", **options) as pair:  # type: ignore[arg-type]
        backend = pair.decode[0].backend
        assert isinstance(backend, FakeBackend)
        backend.held = True
        yield pair, backend


def bring_to(pair: Pair, state: TransferState, pages: range = range(4)) -> tuple[SenderRoom, ReceiverRoom]:
    """A room whose decode side is in this state (BOOTSTRAPPING: prefill has not been told of it)."""
    room = next_room()
    sender, receiver = pair.prefill[0].sender(room), pair.decode[0].receiver(room)
    if state >= WAITING:
        wait_for_state([receiver], WAITING)
    if state >= TRANSFERRING:
        receiver.receive(pages)
        sender.send(pages)
        wait_for_state([sender, receiver], TRANSFERRING)
    if state is SUCCESS:
        sender.finish(b"")
        wait_for_state([sender, receiver], SUCCESS)
    return sender, receiver


def ended_well(pair: Pair, sender: SenderRoom, receiver: ReceiverRoom) -> None:
    """Both ends have failed with a reason that names them, nothing is left, and the next room succeeds."""
    wait_for_state([sender, receiver], FAILED)
    for end, name in ((sender, "prefill instance p0 rank 0"), (receiver, "decode instance d0 rank 0")):
        assert end.failure is not None
        assert str(end.failure).startswith(f"{name}, room {end.room}, in state ")
        assert "the client has gone" in str(end.failure)
    wait_for(lambda: receiver.quiet)
    wait_for(lambda: nothing_left(pair))
    bring_to(pair, SUCCESS)


@pytest.mark.parametrize("state", [WAITING, TRANSFERRING])
def test_an_abort_on_decode_ends_the_room_on_both_sides_and_leaves_nothing(state: TransferState) -> None:
    with running_pair("tcp") as pair:
        sender, receiver = bring_to(pair, state)
        receiver.abort("the client has gone")
        assert receiver.state is FAILED, "the engine need not wait to know"
        ended_well(pair, sender, receiver)


def test_an_abort_on_decode_before_the_request_is_on_prefill_is_remembered_there() -> None:
    with running_pair("tcp") as pair:
        receiver = pair.decode[0].receiver(next_room())
        wait_for_state([receiver], WAITING)
        receiver.abort("the client has gone")
        wait_for(lambda: receiver.quiet)
        ended_well(pair, pair.prefill[0].sender(receiver.room), receiver)


@pytest.mark.parametrize("state", [BOOTSTRAPPING, WAITING, TRANSFERRING])
def test_an_abort_on_prefill_ends_the_room_on_both_sides_and_leaves_nothing(state: TransferState) -> None:
    with running_pair("tcp") as pair:
        sender, receiver = bring_to(pair, state)
        sender.abort("the client has gone")
        assert sender.state is FAILED, "the engine need not wait to know"
        ended_well(pair, sender, receiver)


def test_an_abort_on_decode_while_it_looks_for_prefill_ends_the_search() -> None:
    decode = start_decode_rank(make_layout(), 0, free_port())
    try:
        receiver = decode.receiver(next_room())
        receiver.abort("the client has gone")
        wait_for(lambda: receiver.quiet)
        assert "in state bootstrapping: the client has gone" in str(receiver.failure)
    finally:
        decode.transfer.close()


def test_an_abort_of_a_room_that_has_ended_changes_nothing() -> None:
    with running_pair("tcp") as pair:
        sender, receiver = bring_to(pair, SUCCESS)
        sender.abort("late")
        receiver.abort("late")

        assert (sender.state, receiver.state, sender.failure, receiver.failure) == (SUCCESS, SUCCESS, None, None)


def test_pages_are_not_reused_while_a_write_may_be_in_flight() -> None:
    """A delayed transfer, an abort, and an allocator that is flooded at once: no other request's KV is touched."""
    with held_pair() as (pair, backend):
        (prefill,), (decode,) = pair.prefill, pair.decode
        allocator = PageAllocator(NUM_PAGES)
        pages = allocator.allocate(40)
        sender, receiver = prefill.sender(7001), decode.receiver(7001)
        receiver.receive(pages)
        sender.send(range(40))
        wait_for(lambda: backend.reads)

        receiver.abort("the client has gone")
        wait_for_state([receiver, sender], FAILED)
        others = allocator.allocate(NUM_PAGES - 40)  # all that is free: the aborted room's pages are not
        for pool in decode.pools:
            pool[others] = 77
        assert not receiver.quiet
        assert not set(others.tolist()) & set(pages.tolist())

        backend.release()  # the late write lands now
        wait_for(lambda: receiver.quiet)
        assert all((pool[others] == 77).all() for pool in decode.pools)
        allocator.free(pages)
        assert len(allocator.allocate(40)) == 40


def test_prefill_may_reuse_its_pages_at_once() -> None:
    """What decode reads of a room that prefill has given up never counts, however well it was read."""
    with held_pair() as (pair, backend):
        sender, receiver = bring_to(pair, TRANSFERRING)
        sender.finish(b"")
        wait_for(lambda: backend.reads)
        sender.abort("out of memory")
        for pool in pair.prefill[0].pools:
            pool[:4] = 0
        backend.release()
        wait_for_state([receiver], FAILED)

        assert "prefill instance p0 rank 0 has given it up" in str(receiver.failure)
        assert "out of memory" in str(receiver.failure)


def test_a_failed_read_fails_its_room_only() -> None:
    with held_pair() as (pair, backend):
        _, broken = bring_to(pair, TRANSFERRING)
        wait_for(lambda: len(backend.reads) == 1)
        backend.fail("the cable is out")
        wait_for_state([broken], FAILED)
        backend.held = False
        bring_to(pair, SUCCESS)

        assert broken.failure is not None
        assert broken.failure.kind == "lost"
        assert "in state transferring: prefill instance p0 rank 0: the cable is out" in str(broken.failure)


def test_a_room_used_twice_is_refused_and_the_first_goes_on() -> None:
    with running_pair("tcp") as pair:
        (prefill,), (decode,) = pair.prefill, pair.decode
        sender, receiver = bring_to(pair, WAITING)
        for again in (prefill.sender, decode.receiver):
            with pytest.raises(RoomError, match=f"bootstrap_room {sender.room} is in use by another request"):
                again(sender.room)
        receiver.receive([5])
        wait_for_state([sender], WAITING)
        # Another decode instance was given the same room.
        rival = start_decode_rank(make_layout(), 0, pair.bootstrap.address[1], instance="d1")
        try:
            second = rival.receiver(sender.room)
            second.receive([9])
            wait_for_state([second], FAILED)
            assert second.failure is not None
            assert second.failure.kind == "refused"
            assert "the room is in use by decode instance d0 rank 0" in str(second.failure)
        finally:
            rival.transfer.close()
        sender.send([5])
        sender.finish(b"")
        wait_for_state([sender, receiver], SUCCESS)
        assert same_pages(prefill, [5], decode, [5])


IMPATIENT = Deadlines(bootstrapping=0.3, waiting=0.3, transferring=0.3)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            BOOTSTRAPPING,
            r"prefill instance p0 rank 0, room \d+, in state bootstrapping: stuck for 0.3 s: 0 decode ranks have opened",
        ),
        (WAITING, r"prefill instance p0 rank 0, room \d+, in state waiting: stuck for 0.3 s: its prompt has not been computed"),
        (TRANSFERRING, r"prefill instance p0 rank 0, room \d+, in state transferring: stuck for 0.3 s: no page was computed"),
    ],
)
def test_prefill_names_the_state_it_was_stuck_in(state: TransferState, message: str) -> None:
    with running_pair("tcp", prefill_deadlines=IMPATIENT) as pair:
        room = next_room()
        sender = pair.prefill[0].sender(room)
        if state >= WAITING:
            pair.decode[0].receiver(room).receive([1])
        if state >= TRANSFERRING:
            sender.send([1])
        wait_for_state([sender], FAILED)

        assert sender.failure is not None
        assert sender.failure.kind == "deadline"
        with pytest.raises(RuntimeError, match=message):
            raise sender.failure


def test_decode_names_the_state_it_was_stuck_in() -> None:
    with held_pair(decode_deadlines=IMPATIENT) as (pair, backend):
        _, waiting = bring_to(pair, WAITING)
        waiting.receive([9])
        _, transferring = bring_to(pair, TRANSFERRING)
        wait_for_state([waiting, transferring], FAILED)

        assert "in state waiting: stuck for 0.3 s: prefill instance p0 rank 0 sent no page" in str(waiting.failure)
        assert "in state transferring: stuck for 0.3 s: 1 reads from prefill instance p0 rank 0" in str(transferring.failure)
        assert waiting.quiet
        assert not transferring.quiet, "the slow read may still write"
        backend.release()
        wait_for(lambda: transferring.quiet)


def test_a_request_that_never_comes_to_prefill_is_told_so() -> None:
    with running_pair("tcp", prefill_deadlines=IMPATIENT) as pair:
        receiver = pair.decode[0].receiver(next_room())
        receiver.receive([1])
        wait_for_state([receiver], FAILED)

        assert receiver.failure is not None
        assert receiver.failure.kind == "deadline"
        assert "prefill instance p0 rank 0: the request has not come here" in str(receiver.failure)
        wait_for(lambda: nothing_left(pair))


def test_a_bootstrap_server_that_is_not_there_is_named() -> None:
    port = free_port()
    decode = start_decode_rank(make_layout(), 0, port, deadlines=IMPATIENT)
    try:
        receiver = decode.receiver(next_room())
        wait_for_state([receiver], FAILED)
        assert "decode instance d0 rank 0" in str(receiver.failure)
        assert f"the bootstrap server at 127.0.0.1:{port} can't be reached" in str(receiver.failure)
        decode.transfer.thread.check()
    finally:
        decode.transfer.close()


def test_kv_that_does_not_fit_is_refused_with_both_values() -> None:
    """Decode sees it in the topology; a decode rank that has not looked is refused by prefill."""
    layout = make_layout(page_size=64)
    with running_pair("tcp", decode_layout=layout) as pair:
        receiver = pair.decode[0].receiver(next_room())
        wait_for_state([receiver], FAILED)
        assert receiver.failure is not None
        assert receiver.failure.kind == "refused"
        assert "page size differs: prefill has 16, decode has 64" in str(receiver.failure)

        with socket.create_connection(pair.prefill[0].transfer.address) as stranger:
            hello = Hello(version=PROTOCOL_VERSION, instance="d9", rank=0, layout=layout)
            stranger.sendall(FrameWriter().frame(encoder.encode(hello)))
            answer = read_all(stranger)
        assert b"page size differs: prefill has 16, decode has 64" in answer


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(5)
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_frames_cut_off_repeated_or_foreign_end_their_connection_and_nothing_else() -> None:
    with running_pair("tcp") as pair:
        _, receiver = bring_to(pair, TRANSFERRING)
        hello = FrameWriter().frame(encoder.encode(Hello(version=PROTOCOL_VERSION, instance="d9", rank=0, layout=make_layout())))
        for nonsense in (hello + hello, hello + hello[:7], b"GET / HTTP/1.1\r\nHost: prefill\r\n\r\n", b""):
            with socket.create_connection(pair.prefill[0].transfer.address) as stranger:
                stranger.sendall(nonsense)
                stranger.shutdown(socket.SHUT_WR)
                read_all(stranger)  # ends: the server has closed the connection
        assert receiver.state is TRANSFERRING
        bring_to(pair, SUCCESS)


def test_a_prefill_rank_that_lies_about_pages_fails_the_room() -> None:
    """Too many pages, and pages that its memory does not have."""
    with running_pair("tcp") as pair:
        for pages, words in ((range(5), "announced 5 pages, there is room for 4"), ([NUM_PAGES], r"are not all in \[0, 96\)")):
            room = next_room()
            receiver, sender = pair.decode[0].receiver(room), pair.prefill[0].sender(room)
            receiver.receive(range(4))
            sender.send(pages)
            wait_for_state([receiver, sender], FAILED)
            with pytest.raises(RuntimeError, match=words):
                raise receiver.failure or AssertionError
            wait_for(lambda: receiver.quiet)  # noqa: B023 - called at once


def piece(run: int = 0, length: int = 768, read: int = 0) -> bytes:
    """The header of a run's pages, as the tcp transport sends it."""
    return struct.pack("<4sQIIQ", b"MKP1", read, run, 0, length)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (piece() + bytes(100), "the connection ended when 100 of 768 bytes"),
        (piece(run=1), "run 1 of read 0 came, expected run 0 of read 0"),
        (piece() + bytes(768) + piece(), "run 0 of read 0 came, expected run 1 of read 0"),
        (piece(length=1 << 40), "has 1099511627776 bytes, not 768"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "expected run 0 of read 0"),
    ],
    ids=["truncated", "skipped", "repeated", "too long", "foreign"],
)
def test_pages_over_tcp_that_are_not_what_was_asked_for_end_the_read(answer: bytes, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1000)

        thread = threading.Thread(target=serve)
        thread.start()
        backend = TcpBackend(PagedMemory(make_pools(1)))
        backend.connect("the other", f"127.0.0.1:{listener.getsockname()[1]}".encode())
        read = backend.read("the other", [PageRun(source=0, target=0, num_pages=1), PageRun(source=5, target=5, num_pages=1)])
        wait_for(lambda: read.ended)
        backend.close()
        thread.join()

    assert isinstance(read, TcpRead)
    assert read.error is not None
    assert words in read.error
    assert "reading pages from the other failed" in read.error


def test_a_tcp_connection_that_stood_still_is_made_anew_for_the_next_read() -> None:
    """The control connection lives on, so nobody else would."""
    memory, pages = PagedMemory(make_pools(1)), PageRun(source=0, target=0, num_pages=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        backend = TcpBackend(memory, stalled_s=0.2)
        backend.connect("the other", f"127.0.0.1:{listener.getsockname()[1]}".encode())
        for cut, words in ((3, "the connection stood still for 0.2 s"), (100, "the connection stood still for 0.2 s"), (800, "")):
            read = backend.read("the other", [pages])
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall((piece(read=read.number) + bytes(768))[:cut])
                wait_for(lambda: read.ended, seconds=2.0)  # noqa: B023 - called at once
            assert words in (read.error or ""), read.error
        backend.close()


def test_a_read_whose_request_can_not_be_sent_ends_too() -> None:
    """One that never ended would keep its pages for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        backend = TcpBackend(PagedMemory(make_pools(1)))
        backend.connect("the other", f"127.0.0.1:{listener.getsockname()[1]}".encode())
        connection, _ = listener.accept()
    time.sleep(0.05)  # the thread waits for reads
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()  # with a reset: what is sent from now on fails at once
    time.sleep(0.05)
    read = backend.read("the other", [PageRun(source=0, target=0, num_pages=1)])
    wait_for(lambda: read.ended, seconds=2.0)
    assert "reading pages from the other failed" in (read.error or "")
    backend.close()


def test_a_reader_that_takes_nothing_is_left() -> None:
    """A decode rank that hangs, or whose machine has gone: no thread of prefill waits for it for ever."""
    server = PageServer(PagedMemory(make_pools(1)), "127.0.0.1", 0.2)
    with socket.create_connection(server.address) as connection:
        runs = [struct.pack("<II", 0, NUM_PAGES)] * 2000
        connection.sendall(struct.pack("<4sQI", b"MKP1", 0, len(runs)) + b"".join(runs))
        wait_for(lambda: len(server._connections) == 1)
        wait_for(lambda: not server._connections, seconds=3.0)
    server.close()


def test_pages_are_served_again_once_there_are_file_descriptors() -> None:
    server = PageServer(PagedMemory(make_pools(1)), "127.0.0.1", 1.0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as first, socket.socket() as second:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            first.connect(server.address)  # may be accepted: Linux takes the descriptor before it waits; the next has none
            time.sleep(0.1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        second.connect(server.address)
        second.sendall(struct.pack("<4sQIII", b"MKP1", 0, 1, 0, 1))
        second.settimeout(5.0)
        assert second.recv(28, socket.MSG_WAITALL) == piece()
    server.close()


def test_a_read_that_ends_while_others_are_looked_through_is_not_lost() -> None:
    """Transports' threads end reads at any time."""

    class Ending:
        error = None
        looks = 0

        @property
        def ended(self) -> bool:
            self.looks += 1
            return self.looks > 1

        def cancel(self) -> None: ...

    reads = RoomReads(PagedMemory(make_pools(1)))
    for targets in ([1], [2]):
        reads.add(Fetch(peer="p0", read=Ending(), targets=targets, checksums=[]), 1)
    assert reads.take_ended() == []
    assert [fetch.targets for fetch in reads.take_ended()] == [[1], [2]]
    assert len(reads) == 0


def test_both_sides_must_use_one_transport() -> None:
    with BootstrapServer(port=0) as bootstrap:
        prefill = start_prefill_rank(make_layout(), 0, bootstrap.address[1], "fake")
        decode = start_decode_rank(make_layout(), 0, bootstrap.address[1], "tcp")
        try:
            receiver = decode.receiver(next_room())
            wait_for_state([receiver], FAILED)
            assert "use one transfer backend on both sides" in str(receiver.failure)
        finally:
            decode.transfer.close()
            prefill.transfer.close()


def test_a_closed_decode_instance_frees_prefill_at_once() -> None:
    with running_pair("tcp") as pair:
        sender, _ = bring_to(pair, TRANSFERRING)
        pair.decode[0].transfer.close()
        wait_for_state([sender], FAILED, seconds=2.0)

        assert "decode instance d0 rank 0 has closed the connection" in str(sender.failure)
        assert pair.prefill[0].transfer.book.num_open() == 0


def test_memory_is_checked_when_it_is_handed_in() -> None:
    with pytest.raises(ValueError, match="contiguous matrices of one shape"):
        PagedMemory([np.zeros((4, 8), dtype=np.uint8), np.zeros((4, 9), dtype=np.uint8)])
    with pytest.raises(ValueError, match="contiguous"):
        PagedMemory([np.zeros((4, 16), dtype=np.uint8)[:, ::2]])


def test_a_decode_rank_that_dies_before_it_has_pages_fails_the_room_at_once() -> None:
    with running_pair("tcp") as pair:
        doomed = start_decode_rank(make_layout(), 0, pair.bootstrap.address[1], instance="d1")
        try:
            room = next_room()
            sender, receiver = pair.prefill[0].sender(room), doomed.receiver(room)
            wait_for_state([receiver], WAITING)
        finally:
            doomed.transfer.close()
        wait_for_state([sender], FAILED)
        assert sender.failure is not None and sender.failure.kind == "lost"
        assert "decode instance d1 rank 0 has closed the connection" in str(sender.failure)
        wait_for(lambda: nothing_left(pair))
