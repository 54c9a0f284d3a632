"""A real sglang-router process in front of running servers, started by `moesaic router`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import httpx
from http_server import wait_for
from live_server import free_port


class Worker(Protocol):
    """Anything with an address."""

    @property
    def url(self) -> str: ...


@contextmanager
def router(workers: Sequence[Worker], log: Path, *flags: str) -> Iterator[httpx.Client]:
    """A client of a router that has accepted all workers."""
    with _running(["--worker-urls", *(worker.url for worker in workers), *flags], log) as client:
        yield client


@contextmanager
def pd_router(prefill: Sequence[tuple[Worker, int]], decode: Sequence[Worker], log: Path, *flags: str) -> Iterator[httpx.Client]:
    """A client of a router in --pd-disaggregation; `prefill`: servers with the ports of their bootstrap servers."""
    arguments = ["--pd-disaggregation"]
    for worker, port in prefill:
        arguments += ["--prefill", worker.url, str(port)]
    for worker in decode:
        arguments += ["--decode", worker.url]
    with _running([*arguments, *flags], log) as client:
        yield client


@contextmanager
def _running(arguments: Sequence[str], log: Path) -> Iterator[httpx.Client]:
    port = free_port()
    command = [sys.executable, "-P", "-m", "moesaic.launch.cli", "router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1", *arguments]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                wait_for(lambda: _serves(client, process, log), 30)
                yield client
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _serves(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-2000:]
    try:
        return len(client.get("/workers").json()["workers"]) >= 2 and client.get("/readiness").status_code == 200
    except (httpx.TransportError, ValueError, KeyError):
        return False
