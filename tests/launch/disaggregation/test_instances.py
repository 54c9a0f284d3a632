"""Instances that are killed, freeze, come back: real processes, each on its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from live_server import free_port
from own_connections import break_connections, own_connections
from pd_ranks import DecodeSide, make_layout, make_pools, next_room, running_pair, start_decode_rank, wait_for, wait_for_state

from moesaic.launch.disaggregation.backends import missing_reason
from moesaic.launch.disaggregation.bootstrap_client import fetch_topology
from moesaic.launch.disaggregation.protocol import TransferState
from moesaic.launch.disaggregation.receiver_room import ReceiverRoom

SUPPORT = Path(__file__).parents[2] / "support"
WAITING, TRANSFERRING, SUCCESS, FAILED = (
    TransferState.WAITING,
    TransferState.TRANSFERRING,
    TransferState.SUCCESS,
    TransferState.FAILED,
)
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(missing_reason(name) is not None, reason=str(missing_reason(name))))
    for name in ("tcp", "nixl")
]


class Instance:
    """A rank in a process of its own."""

    def __init__(self, role: str, port: int, backend: str, instance: str) -> None:
        command = [sys.executable, "-P", str(SUPPORT / "pd_process.py"), role, str(port), backend, instance]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # nixl talks on standard output too
            if line == "ready\n":
                return
        raise AssertionError("the process ended before it was ready")

    def tell(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@contextlib.contextmanager
def instances(*wanted: tuple[str, int, str, str]) -> Iterator[list[Instance]]:
    """Started at the same time; killed at the end."""
    running = [Instance(*one) for one in wanted]
    try:
        for one in running:
            one.wait_until_ready()
        yield running
    finally:
        for one in running:
            one.close()


@contextlib.contextmanager
def decode_rank(port: int, backend: str) -> Iterator[DecodeSide]:
    decode = start_decode_rank(make_layout(), 0, port, backend)  # type: ignore[arg-type]
    try:
        yield decode
        decode.transfer.thread.check()
    finally:
        decode.transfer.close()


def fetch(decode: DecodeSide, prefill: Instance, port: int, *, finish: bool = True) -> ReceiverRoom:
    """A room of four pages from that instance."""
    receiver = decode.transfer.receiver(next_room(), "127.0.0.1", port)
    assert isinstance(receiver, ReceiverRoom)
    receiver.receive([1, 2, 3, 4])
    prefill.tell(f"room {receiver.room}")
    prefill.tell(f"send {receiver.room} 1 2 3 4")
    if finish:
        prefill.tell(f"finish {receiver.room}")
    return receiver


@contextlib.contextmanager
def reading_from_a_frozen(
    prefill: Instance, decode: DecodeSide, pages: Sequence[int], then: Callable[[], object] = lambda: None
) -> Iterator[ReceiverRoom]:
    """All pages of a room are announced, prefill's process is frozen until the end; `then` decode begins to read them."""
    receiver = decode.receiver(next_room())
    receiver.receive(pages)
    prefill.tell(f"room {receiver.room}")
    wait_for(lambda: prefill.tell(f"state {receiver.room}").startswith("WAITING"))  # it has heard that the pages are ready
    go_on = threading.Event()
    decode.transfer.thread.post(go_on.wait)
    prefill.tell(f"send {receiver.room} {' '.join(map(str, pages))}")
    prefill.tell(f"finish {receiver.room}")
    wait_for(lambda: prefill.tell(f"state {receiver.room}").startswith("TRANSFERRING"))  # it has said what is in them
    prefill.process.send_signal(signal.SIGSTOP)
    try:
        then()
        go_on.set()
        wait_for(lambda: receiver.num_reads == 1)
        yield receiver
    finally:
        prefill.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_prefill_fails_its_rooms_at_once_others_go_on_and_its_return_is_noticed(backend: str) -> None:
    port, other_port = free_port(), free_port()
    with (
        instances(("prefill", port, backend, "p0"), ("prefill", other_port, backend, "p1")) as (prefill, other),
        decode_rank(port, backend) as decode,
    ):
        wait_for_state([fetch(decode, prefill, port), fetch(decode, other, other_port)], SUCCESS)
        if backend == "tcp":
            prefill.tell("hold")
        victim = fetch(decode, prefill, port, finish=False)
        idle = decode.receiver(next_room())
        wait_for_state([victim], TRANSFERRING)
        wait_for_state([idle], WAITING)

        prefill.process.kill()
        began = time.monotonic()
        wait_for_state([victim, idle], FAILED, seconds=5.0)
        assert time.monotonic() - began < 5.0
        for room, state in ((victim, "transferring"), (idle, "waiting")):
            assert room.failure is not None
            assert room.failure.kind == "lost"
            text = f"decode instance d0 rank 0, room {room.room}, in state {state}: "
            assert str(room.failure).startswith(text)
            assert "p0" in str(room.failure)
        wait_for(lambda: victim.quiet and idle.quiet)
        wait_for_state([fetch(decode, other, other_port)], SUCCESS)

        with instances(("prefill", port, backend, "p0 again")) as (again,):
            wait_for_state([fetch(decode, again, port)], SUCCESS)
        assert decode.transfer.book.num_open() == 0


@pytest.mark.skipif(missing_reason("nixl") is not None, reason=str(missing_reason("nixl")))
def test_nixls_connection_is_made_anew_when_it_alone_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two transfers, and again and again: then that one fails, naming the peer, and the next one is well.

    Not while a page is on its way: UCX emulates reads over TCP, and its answering side ends its process ("Fatal: unexpected error:
    Endpoint timeout") when it has nobody to answer to. Over RDMA nobody answers.
    """
    monkeypatch.setenv("UCX_TLS", "tcp")  # memory that two processes share can't be cut off
    port, others = free_port(), set(own_connections())
    with instances(("prefill", port, "nixl", "p0")) as (prefill,), decode_rank(port, "nixl") as decode:
        wait_for_state([fetch(decode, prefill, port)], SUCCESS)
        control = {place.rank_port for group in fetch_topology(f"127.0.0.1:{port}").addresses for place in group}

        def cut() -> int:
            return break_connections(but=others, but_ports=control)

        for pool in decode.pools:
            pool[:] = 0
        assert cut() > 0
        wait_for_state([fetch(decode, prefill, port)], SUCCESS)
        assert all((ours[1:5] == theirs[1:5]).all() for ours, theirs in zip(decode.pools, make_pools(0), strict=True))

        with reading_from_a_frozen(prefill, decode, [1, 2], then=cut) as hopeless:
            wait_for(lambda: cut() < 0 or hopeless.state is FAILED, 3.0)
        assert "prefill instance p0 rank 0: nixl could not read from p0/0/" in str(hopeless.failure)
        assert "(3 of 3 attempts, each over a new connection)" in str(hopeless.failure)
        wait_for_state([fetch(decode, prefill, port)], SUCCESS)


def test_a_frozen_prefill_is_noticed_within_5_s() -> None:
    port = free_port()
    with instances(("prefill", port, "tcp", "p0")) as (prefill,), decode_rank(port, "tcp") as decode:
        receiver = fetch(decode, prefill, port, finish=False)
        wait_for_state([receiver], TRANSFERRING)
        prefill.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        wait_for_state([receiver], FAILED)

        assert time.monotonic() - began < 5.0
        assert "no sign of life from prefill instance p0 rank 0 for 4 s" in str(receiver.failure)
        wait_for(lambda: receiver.quiet)


@pytest.mark.whole
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_prefill_that_wakes_up_writes_to_no_page_of_others(backend: str) -> None:
    """Decode has begun to read from it and taken it for dead; the pages belong to others when it goes on."""
    port, other_port, pages = free_port(), free_port(), range(10, 90)
    with (
        instances(("prefill", port, backend, "p0"), ("prefill", other_port, backend, "p1")) as (prefill, other),
        decode_rank(port, backend) as decode,
    ):
        with reading_from_a_frozen(prefill, decode, pages) as receiver:
            wait_for(lambda: receiver.quiet)
            assert "no sign of life from prefill instance p0 rank 0" in str(receiver.failure)
            for pool in decode.pools:
                pool[pages] = 7
        for _ in range(10):
            wait_for_state([fetch(decode, other, other_port)], SUCCESS)
            time.sleep(0.1)
        assert all((pool[pages] == 7).all() for pool in decode.pools)
        wait_for_state([fetch(decode, prefill, port)], SUCCESS)


def test_a_killed_decode_fails_its_rooms_on_prefill_only_and_its_return_is_served() -> None:
    with running_pair("tcp") as pair:
        (prefill,), port = pair.prefill, pair.bootstrap.address[1]
        with instances(("decode", port, "tcp", "d7")) as (decode,):
            room, own = next_room(), next_room()
            sender, kept = prefill.sender(room), prefill.sender(own)
            decode.tell(f"room {room}")
            decode.tell(f"receive {room} 1 2")
            receiver = pair.decode[0].receiver(own)
            receiver.receive([1])
            wait_for_state([sender, kept], WAITING)
            sender.send([1])
            wait_for_state([sender], TRANSFERRING)
            decode.process.kill()
            wait_for_state([sender], FAILED, seconds=5.0)

        assert sender.failure is not None
        assert sender.failure.kind == "lost"
        assert "decode instance d7 rank 0" in str(sender.failure)
        kept.send([1])
        kept.finish(b"")
        wait_for_state([kept, receiver], SUCCESS)
        with instances(("decode", port, "tcp", "d7 again")) as (again,):
            room = next_room()
            sender = prefill.sender(room)
            again.tell(f"room {room}")
            again.tell(f"receive {room} 1")
            sender.send([1])
            sender.finish(b"")
            wait_for_state([sender], SUCCESS)
            wait_for(lambda: again.tell(f"state {room}").startswith("SUCCESS"))
