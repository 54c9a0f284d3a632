"""A real `moesaic serve` process for end-to-end tests: real ranks, real HTTP, on free ports, never left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import httpx
from http_server import wait_for

START_DEADLINE_S = 90


def free_port(following: int = 0) -> int:
    """A loopback port that nobody listens on, nor on so many `following` ones, below those the system gives to outgoing
    connections: it stays free until bound. Each pytest worker (pytest-xdist) has ports of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    while True:
        port = random.randrange(20_000 + 3_000 * worker, 22_980 + 3_000 * worker)
        with contextlib.suppress(OSError):
            for each in range(port, port + following + 1):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
            return port


class LiveServer:
    """`with LiveServer(model, log, "--tp", "2", ...) as server`: started and ready; stopped by Ctrl-C at the end."""

    def __init__(self, model_path: Path, log: Path, *flags: str, port: int | None = None, ready: str = "Ctrl-C stops it") -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._ready = ready
        command = [sys.executable, "-P", "-m", "moesaic.launch.cli", "serve", "--model-path", str(model_path)]
        command += ["--device", "cpu", "--num-threads", "1", "--port", str(self.port), *flags]
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def __enter__(self) -> LiveServer:
        self.wait_ready()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_ready(self) -> None:
        """Until the server says that it serves (or, for `ready`, what another node says)."""

        def ready() -> bool:
            assert self.process.poll() is None, f"the server ended while starting:\n{self.output[-3000:]}"
            return self._ready in self.output

        wait_for(ready, START_DEADLINE_S)

    def stop(self) -> int:
        """Ctrl-C, then harder. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def rank_pids(self) -> list[int]:
        """Process ids of this server's ranks, in rank order."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"\nPPid:\t{self.process.pid}\n" in (entry / "status").read_text():
                    name = (entry / "cmdline").read_text().split("\0")[4]
                    found[int(name.rpartition("rank")[2])] = int(entry.name)
            except (OSError, IndexError, ValueError):
                continue
        return [found[rank] for rank in sorted(found)]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30)

    def used_tokens(self) -> int:
        """KV tokens held by running requests, all DP ranks together."""
        loads = self._loads()
        return sum(load["num_used_tokens"] + load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)

    def holds(self, *, running: int, waiting: int) -> bool:
        """Whether so many requests at least run and wait, all DP ranks together."""
        loads = self._loads()
        counts = [sum(load[name] for load in loads) for name in ("num_running_reqs", "num_waiting_reqs")]
        return counts[0] >= running and counts[1] >= waiting

    def _loads(self) -> list[dict[str, int]]:
        with self.client() as client:
            loads: list[dict[str, int]] = client.get("/v1/loads").json()["loads"]
        return loads


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
