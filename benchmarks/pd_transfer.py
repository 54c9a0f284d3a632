"""The first part of bench_pd.py: how fast KV travels, against a bare copy through the same transport in the same run.

Two processes on this machine, each with a KV pool of its own (DeepSeek-V3's latent rows in bf16, pages of 64 tokens). Three ways to
bring the same bytes from the one to the other, the first two in turns:
  rooms      prompts in chunks, several at a time, through the whole protocol: open, announce, fetch, hand over
  bare copy  one read of one run of pages, without any protocol: the most this transport gives (the floor of the time)
  socket     the same bytes down a plain TCP socket into one buffer: the floor of any transport over TCP
Pages of a prompt lie in runs of `--run-pages`, as an allocator that has worked for a while leaves them. `transfer_share` is the
throughput of rooms over that of the bare copy, the median over the rounds.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from moesaic.launch.disaggregation.backends import BackendName, make_backend, missing_reason
from moesaic.launch.disaggregation.bootstrap import BootstrapServer, registration
from moesaic.launch.disaggregation.bootstrap_client import register_rank
from moesaic.launch.disaggregation.directory import DecodeRank
from moesaic.launch.disaggregation.layout import PageRun, page_runs
from moesaic.launch.disaggregation.memory import PagedMemory
from moesaic.launch.disaggregation.protocol import KVLayout, TransferState
from moesaic.launch.disaggregation.receiver import DecodeTransfer
from moesaic.launch.disaggregation.sender import PrefillTransfer

PAGE_TOKENS, LATENT_BYTES = 64, 576 * 2
POLL_S = 0.001
"""As often as an engine that waits for transfers looks at its rooms. A thread that looks more often takes time from the copying."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How much is sent and how it is cut up, in pages of so many layers."""

    rooms: int
    pages: int
    run_pages: int
    chunk_pages: int
    layers: int

    @property
    def num_pages(self) -> int:
        return self.rooms * self.pages

    @property
    def num_bytes(self) -> int:
        return self.num_pages * PAGE_TOKENS * LATENT_BYTES * self.layers

    @property
    def layout(self) -> KVLayout:
        return KVLayout(
            model_id="bench",
            tp_size=1,
            dp_size=1,
            ep_size=1,
            page_size=PAGE_TOKENS,
            kv_dtype="bfloat16",
            bytes_per_token=self.layers * LATENT_BYTES,
            num_layers=self.layers,
        )

    def pages_of(self, room: int, seed: int) -> np.ndarray:
        """The pages of a room: runs of `run_pages`, the runs in random order over the pool."""
        runs = np.random.default_rng(seed).permutation(self.num_pages // self.run_pages)
        pages = (runs[:, None] * self.run_pages + np.arange(self.run_pages)).ravel()
        return pages[room * self.pages : (room + 1) * self.pages]


def make_memory(shape: Shape, value: int) -> PagedMemory:
    """Every page touched: a first write would cost more than the transfer."""
    size = (shape.num_pages, PAGE_TOKENS * LATENT_BYTES)
    return PagedMemory([np.full(size, value, dtype=np.uint8) for _ in range(shape.layers)])


# The prefill process: one line of rooms' numbers on standard input is one round


def serve(name: BackendName, shape: Shape) -> None:
    memory = make_memory(shape, 7)
    backend = make_backend(name, memory)
    with BootstrapServer(port=0) as bootstrap, socket.create_server(("127.0.0.1", 0)) as listener:
        transfer = PrefillTransfer(instance="bench", rank=0, layout=shape.layout, memory=memory, backend=backend)
        place = registration(shape.layout, instance="bench", dp_rank=0, attn_tp_rank=0, address=transfer.address)
        register_rank(f"127.0.0.1:{bootstrap.address[1]}", place)
        threading.Thread(target=serve_socket, args=(listener, memory), daemon=True).start()
        print("ready", bootstrap.address[1], listener.getsockname()[1], flush=True)
        for line in sys.stdin:
            senders = [transfer.sender(int(room)) for room in line.split()]
            while any(sender.state < TransferState.WAITING for sender in senders):
                time.sleep(POLL_S)
            for start in range(0, shape.pages, shape.chunk_pages):
                for index, sender in enumerate(senders):
                    sender.send(shape.pages_of(index, seed=1)[start : start + shape.chunk_pages])
            for sender in senders:
                sender.finish(b"first token")
        transfer.close()


def serve_socket(listener: socket.socket, memory: PagedMemory) -> None:
    """The whole pool down the socket for each byte that comes in."""
    connection, _ = listener.accept()
    while connection.recv(1):
        for view in memory.views(0, memory.num_pages):
            connection.sendall(view)


# The decode process


class Decode:
    """Times the three ways."""

    def __init__(self, name: BackendName, shape: Shape, child: subprocess.Popen[str]) -> None:
        self._shape, self._child = shape, child
        assert child.stdout is not None
        _, bootstrap, plain = next(line for line in child.stdout if line.startswith("ready")).split()
        self._port = int(bootstrap)
        self._plain = socket.create_connection(("127.0.0.1", int(plain)))
        self._memory = make_memory(shape, 1)
        self._backend = make_backend(name, self._memory)
        rank = DecodeRank(instance="bench-decode", rank=0, layout=shape.layout)
        self._transfer = DecodeTransfer(rank=rank, memory=self._memory, backend=self._backend)
        self._next_room = 0

    def rooms_s(self) -> float:
        """From opening the rooms to the last one's success."""
        shape = self._shape
        rooms = range(self._next_room, self._next_room + shape.rooms)
        self._next_room += shape.rooms
        receivers = [self._transfer.receiver(room, "127.0.0.1", self._port) for room in rooms]
        while any(receiver.state < TransferState.WAITING for receiver in receivers):
            time.sleep(POLL_S)
        assert self._child.stdin is not None
        self._child.stdin.write(" ".join(map(str, rooms)) + "\n")
        self._child.stdin.flush()
        start_s = time.perf_counter()
        for index, receiver in enumerate(receivers):
            receiver.receive(shape.pages_of(index, seed=2))
        while not all(receiver.state.final for receiver in receivers):
            time.sleep(POLL_S)
        elapsed_s = time.perf_counter() - start_s
        assert all(receiver.state is TransferState.SUCCESS for receiver in receivers), [receiver.failure for receiver in receivers]
        return elapsed_s

    def bare_s(self) -> float:
        """One read of the same number of pages in one run, by the connection that the rooms use."""
        (peer,) = self._transfer.backend._peers  # type: ignore[attr-defined]
        start_s = time.perf_counter()
        read = self._backend.read(peer, [PageRun(source=0, target=0, num_pages=self._shape.num_pages)])
        while not read.ended:
            time.sleep(POLL_S)
        assert read.error is None, read.error
        return time.perf_counter() - start_s

    def socket_s(self) -> float:
        start_s = time.perf_counter()
        self._plain.sendall(b"!")
        for view in self._memory.views(0, self._memory.num_pages):
            received = 0
            while received < len(view):
                received += self._plain.recv_into(view[received:], 0, socket.MSG_WAITALL)
        return time.perf_counter() - start_s

    def check(self) -> None:
        """The bytes are there."""
        assert all(view[0] == view[-1] == 7 for view in self._memory.views(0, self._memory.num_pages))

    def close(self) -> None:
        self._plain.close()
        self._transfer.close()


def measure(name: BackendName, shape: Shape, rounds: int) -> dict[str, float]:
    """Medians over the rounds, after one that warms up: GB/s of each way, and the share."""
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in vars(shape).items()]
    command = [sys.executable, "-P", __file__, "--serve", name, *sizes]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        decode = Decode(name, shape, child)
        decode.rooms_s(), decode.bare_s()
        # The socket comes last: it would leave the caches to one of the other two in every round.
        times = [(decode.rooms_s(), decode.bare_s()) for _ in range(rounds)]
        plain_s = [decode.socket_s() for _ in range(rounds)]
        decode.check()
        decode.close()
    finally:
        child.kill()
        child.communicate()
    ways = (*zip(*times, strict=True), plain_s)
    rooms, bare, plain = (shape.num_bytes / statistics.median(way) / 1e9 for way in ways)
    share = statistics.median(bare_s / rooms_s for rooms_s, bare_s in times)
    return {"rooms_gb_s": rooms, "bare_gb_s": bare, "socket_gb_s": plain, "share": share}


def measure_transports(names: Sequence[BackendName], shape: Shape, rounds: int) -> dict[str, float]:
    """Prints a table; the share of each transport that can be had here."""
    num_runs = sum(len(page_runs(shape.pages_of(room, 1), shape.pages_of(room, 2))) for room in range(shape.rooms))
    size = f"{shape.rooms} rooms of {shape.pages} pages, {shape.layers} layers: {shape.num_bytes / 1e6:.0f} MB in {num_runs} runs"
    print(f"{size}; chunks of {shape.chunk_pages} pages")
    print(f"{'transport':<12}{'rooms GB/s':>12}{'bare GB/s':>12}{'socket GB/s':>13}{'share':>8}")
    shares: dict[str, float] = {}
    for name in names:
        reason = missing_reason(name)
        if reason is not None:
            print(f"{name:<12}not measured: {reason}")
            continue
        found = measure(name, shape, rounds)
        shares[name] = round(found["share"], 3)
        row = f"{found['rooms_gb_s']:>12.2f}{found['bare_gb_s']:>12.2f}{found['socket_gb_s']:>13.2f}{found['share']:>8.2f}"
        print(f"{name:<12}{row}", flush=True)
    return shares


def main() -> None:
    """The prefill process of `measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, required=True)
    parser.add_argument("--serve", choices=["tcp", "nixl", "mooncake"], required=True)
    args = vars(parser.parse_args())
    serve(args.pop("serve"), Shape(**args))


if __name__ == "__main__":
    main()
