"""Runs the HTTP server in the current event loop until it is told to stop or the engine fails.

Knows uvicorn; handles no signals (the launcher does, as it also has ranks to end).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable, Generator

import uvicorn
from fastapi import FastAPI

from moesaic.launch.http.app import make_app
from moesaic.launch.http.client import RankClient
from moesaic.launch.http.config import HttpConfig
from moesaic.launch.http.errors import EngineFailedError
from moesaic.launch.http.tokenizer import load_tokenizer

# After the last answer is decided, how long clients may take to receive it.
FLUSH_SECONDS = 2


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, so that a taken port is known before any weights are read. Raises OSError that says so."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only on sockets that say they are TCP; with it on, the second write of an answer, and a
    # token of a stream, waits 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Without this two servers that both reuse the address could share the port until one of them listens.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


async def serve(
    config: HttpConfig,
    client: RankClient,
    *,
    sock: socket.socket,
    stop: asyncio.Event,
    on_started: Callable[[], None] = lambda: None,
) -> None:
    """Serve on `sock` until `stop` is set. Call it after `client.wait_ready`; the client stays open.

    On `stop`, requests in flight have `config.drain_seconds` to end, and then get a 503. When the engine fails, every
    client gets a 503 at once and EngineFailedError is raised.
    """
    random.seed(config.random_seed)
    tokenizer = load_tokenizer(config.tokenizer_path or config.model_path)
    server = _Server(_uvicorn_config(config, make_app(config, client, tokenizer)))
    running = asyncio.create_task(server.serve(sockets=[sock]), name="http server")
    stopping = asyncio.create_task(stop.wait())
    failing = asyncio.create_task(client.wait_failed())
    try:
        await _wait_started(server, running)
        on_started()
        await asyncio.wait((running, stopping, failing), return_when=asyncio.FIRST_COMPLETED)
        if not failing.done():
            await _drain(client, config.drain_seconds)
        server.should_exit = True
        await running
        if failing.done():
            raise EngineFailedError(failing.result())
    finally:
        for task in (running, stopping, failing):
            task.cancel()
        await asyncio.gather(running, stopping, failing, return_exceptions=True)


def _uvicorn_config(config: HttpConfig, app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level=config.log_level_http,
        access_log=config.log_level_http in ("debug", "info"),
        timeout_graceful_shutdown=FLUSH_SECONDS,
        timeout_keep_alive=60,
        lifespan="off",
        ws="none",
    )


async def _wait_started(server: uvicorn.Server, running: asyncio.Task[None]) -> None:
    while not server.started:
        if running.done():
            await running
            raise RuntimeError("the HTTP server has ended before it started")
        await asyncio.sleep(0.01)


async def _drain(client: RankClient, seconds: float) -> None:
    """Let those in flight end; then tell the rest."""
    client.refuse_new("the server is shutting down")
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while client.num_in_flight() and loop.time() < deadline:
        await asyncio.sleep(0.02)
    client.drop_all("the server is shutting down")
