"""Prefill and decode ranks without models: paged memory with known bytes, real sockets, and short waits."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesaic.launch.disaggregation.backends import BackendName, make_backend
from moesaic.launch.disaggregation.bootstrap import BootstrapServer, registration
from moesaic.launch.disaggregation.bootstrap_client import register_rank
from moesaic.launch.disaggregation.directory import DecodeRank
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.protocol import Deadlines, KVLayout, TransferState
from moesaic.launch.disaggregation.receiver import DecodeTransfer
from moesaic.launch.disaggregation.receiver_room import ReceiverRoom
from moesaic.launch.disaggregation.sender import PrefillTransfer
from moesaic.launch.disaggregation.sender_room import SenderRoom
from moesaic.launch.disaggregation.transfer import Backend, Receiver, Sender

NUM_LAYERS, LAYER_PAGE_BYTES, NUM_PAGES = 3, 256, 96
PATIENT = Deadlines(bootstrapping=20.0, waiting=20.0, transferring=20.0)

Pools = list[npt.NDArray[np.uint8]]
_rooms = itertools.count(1000)


def next_room() -> int:
    """A room that nobody has used."""
    return next(_rooms)


def make_layout(tp_size: int = 1, dp_size: int = 1, *, page_size: int = 16, kv_dtype: str = "float32") -> KVLayout:
    return KVLayout(
        model_id="tiny",
        tp_size=tp_size,
        dp_size=dp_size,
        ep_size=tp_size,
        page_size=page_size,
        kv_dtype=kv_dtype,
        bytes_per_token=NUM_LAYERS * LAYER_PAGE_BYTES // 16,
        num_layers=NUM_LAYERS,
    )


def make_pools(seed: int, num_pages: int = NUM_PAGES, layer_page_bytes: int = LAYER_PAGE_BYTES) -> Pools:
    """One array of random bytes per layer."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (num_pages, layer_page_bytes), dtype=np.uint8) for _ in range(NUM_LAYERS)]


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Poll a condition; fail when it has not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"this has not come true within {seconds} s"
        time.sleep(0.002)


def wait_for_state(ends: Sequence[Sender | Receiver], state: TransferState, seconds: float = 10.0) -> None:
    """All reach the state (or a later one), none fails unless that is what is waited for."""

    def reached() -> bool:
        for end in ends:
            assert end.state is not TransferState.FAILED or state is TransferState.FAILED, end.failure
        return all(end.state is state or (state is not TransferState.FAILED and end.state > state) for end in ends)

    wait_for(reached, seconds)


@dataclass
class PrefillRank:
    """One prefill rank with its memory."""

    transfer: PrefillTransfer
    pools: Pools
    backend: Backend

    def sender(self, room: int) -> SenderRoom:
        sender = self.transfer.sender(room)
        assert isinstance(sender, SenderRoom)
        return sender


@dataclass
class DecodeSide:
    """One decode rank with its memory."""

    transfer: DecodeTransfer
    pools: Pools
    backend: Backend
    port: int

    def receiver(self, room: int, dp_rank: int | None = None) -> ReceiverRoom:
        receiver = self.transfer.receiver(room, "127.0.0.1", self.port, dp_rank)
        assert isinstance(receiver, ReceiverRoom)
        return receiver


def start_prefill_rank(
    layout: KVLayout,
    rank: int,
    port: int,
    backend_name: BackendName = "tcp",
    *,
    instance: str = "p0",
    deadlines: Deadlines = PATIENT,
    pools: Pools | None = None,
) -> PrefillRank:
    """A prefill rank that has registered at the bootstrap server on `port`. Ranks of a DP group hold the same bytes."""
    dp_rank, attn_tp_rank = divmod(rank, layout.attn_tp_size)
    pools = pools or make_pools(seed=dp_rank)
    memory = PagedMemory(pools)
    backend = make_backend(backend_name, memory)
    transfer = PrefillTransfer(instance=instance, rank=rank, layout=layout, memory=memory, backend=backend, deadlines=deadlines)
    place = registration(layout, instance=instance, dp_rank=dp_rank, attn_tp_rank=attn_tp_rank, address=transfer.address)
    register_rank(f"127.0.0.1:{port}", place, seconds=5.0)
    return PrefillRank(transfer, pools, backend)


def start_decode_rank(
    layout: KVLayout,
    rank: int,
    port: int,
    backend_name: BackendName = "tcp",
    *,
    instance: str = "d0",
    deadlines: Deadlines = PATIENT,
    checksum: bool = False,
    pools: Pools | None = None,
) -> DecodeSide:
    """A decode rank that fetches from the prefill instance whose bootstrap server is on `port`."""
    pools = pools or make_pools(seed=100 + rank)
    memory = PagedMemory(pools)
    backend = make_backend(backend_name, memory)
    who = DecodeRank(instance=instance, rank=rank, layout=layout)
    transfer = DecodeTransfer(rank=who, memory=memory, backend=backend, deadlines=deadlines, checksum=checksum)
    return DecodeSide(transfer, pools, backend, port)


@dataclass
class Pair:
    """A prefill and a decode instance in this process."""

    prefill: list[PrefillRank]
    decode: list[DecodeSide]
    bootstrap: BootstrapServer


@contextlib.contextmanager
def running_pair(
    backend_name: BackendName = "tcp",
    *,
    prefill_layout: KVLayout | None = None,
    decode_layout: KVLayout | None = None,
    prefill_deadlines: Deadlines = PATIENT,
    decode_deadlines: Deadlines = PATIENT,
    checksum: bool = False,
) -> Iterator[Pair]:
    """Both instances, closed at the end; then no thread of theirs is left and nothing went wrong that no room stands for."""
    prefill_layout, decode_layout = prefill_layout or make_layout(), decode_layout or make_layout()
    with contextlib.ExitStack() as stack:
        bootstrap = stack.enter_context(BootstrapServer(port=0))
        port = bootstrap.address[1]
        pair = Pair([], [], bootstrap)
        for rank in range(prefill_layout.tp_size):
            one = start_prefill_rank(prefill_layout, rank, port, backend_name, deadlines=prefill_deadlines)
            stack.callback(one.transfer.close)
            pair.prefill.append(one)
        for rank in range(decode_layout.tp_size):
            other = start_decode_rank(decode_layout, rank, port, backend_name, deadlines=decode_deadlines, checksum=checksum)
            stack.callback(other.transfer.close)
            pair.decode.append(other)
        yield pair
        for end in (*pair.prefill, *pair.decode):
            end.transfer.thread.check()


def nothing_left(pair: Pair) -> bool:
    """No room is open on either side."""
    return not any(end.transfer.book.num_open() for end in (*pair.prefill, *pair.decode))


def same_pages(prefill: PrefillRank, sent: Sequence[int], decode: DecodeSide, received: Sequence[int]) -> bool:
    """Whether the pages hold the same bytes in all layers."""
    layers = zip(prefill.pools, decode.pools, strict=True)
    return all(np.array_equal(theirs[list(sent)], ours[list(received)]) for theirs, ours in layers)
