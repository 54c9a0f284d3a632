"""A prefill and a decode server, each a real `moesaic serve`, and the real router in front of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from live_server import LiveServer, free_port

_rooms = itertools.count(1000)


def next_room() -> int:
    """A room that nobody has used."""
    return next(_rooms)


@dataclass(frozen=True)
class PdPair:
    """`bootstrap_port`: of the prefill server."""

    prefill: LiveServer
    decode: LiveServer
    bootstrap_port: int

    def room(self, room: int | list[int] | None = None) -> dict[str, Any]:
        """The fields that a router adds to a request."""
        number = next_room() if room is None else room
        return {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap_port, "bootstrap_room": number}

    def both(self, path: str, body: dict[str, Any]) -> tuple[httpx.Response, httpx.Response]:
        """What the prefill and the decode server say to one request, sent to both at once as a router does."""

        def post(server: LiveServer) -> httpx.Response:
            with server.client() as client:
                return client.post(path, json=body)

        with ThreadPoolExecutor(2) as threads:
            first, second = threads.map(post, (self.prefill, self.decode))
        return first, second

    def used_tokens(self) -> int:
        """What requests hold on either side."""
        return self.prefill.used_tokens() + self.decode.used_tokens()


@contextlib.contextmanager
def pd_pair(
    model: Path, folder: Path, prefill_flags: Sequence[str] = (), decode_flags: Sequence[str] = (), *, tokens: int = 2048
) -> Iterator[PdPair]:
    """Both started and ready; `tokens`: KV of each DP rank."""
    port = free_port()
    common = ("--disaggregation-bootstrap-port", str(port), "--max-total-tokens", str(tokens), "--enable-metrics")
    prefill = LiveServer(model, folder / "prefill.log", "--disaggregation-mode", "prefill", *common, *prefill_flags)
    decode = LiveServer(model, folder / "decode.log", "--disaggregation-mode", "decode", *common, *decode_flags)
    with contextlib.ExitStack() as stack:
        stack.callback(prefill.stop)
        stack.callback(decode.stop)
        prefill.wait_ready()
        decode.wait_ready()
        yield PdPair(prefill, decode, port)


def greedy(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    return {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}}


def post(server: LiveServer, body: dict[str, Any]) -> httpx.Response:
    with server.client() as client:
        return client.post("/generate", json=body)


def start_prefill(model: Path, log: Path, bootstrap_port: int, port: int, *more: str, chunk: int = 16) -> LiveServer:
    flags = ("--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", str(bootstrap_port), *more)
    server = LiveServer(model, log, *flags, "--max-total-tokens", "2048", "--chunked-prefill-size", str(chunk), port=port)
    server.wait_ready()
    return server


def kill(server: LiveServer) -> None:
    """The launcher and its ranks, without a word."""
    for pid in [*server.rank_pids(), server.process.pid]:
        os.kill(pid, signal.SIGKILL)
    server.process.wait()


@contextlib.contextmanager
def frozen(server: LiveServer) -> Iterator[None]:
    """The server's ranks stand still meanwhile; its HTTP side goes on."""
    pids = server.rank_pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def metric(server: LiveServer, name: str) -> float:
    """The sum of one of the server's metrics over its DP ranks."""
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"moesaic:{name}{{"))
