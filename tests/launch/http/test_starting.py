"""The port of a server whose ranks still start."""

from __future__ import annotations

import asyncio
import socket

import httpx

from moesaic.launch.http.serve import bind
from moesaic.launch.http.starting import answer_while_starting


def test_a_server_that_starts_says_so_and_its_port_listens_on() -> None:
    listener = bind("127.0.0.1", 0)
    address = listener.getsockname()

    async def ask() -> httpx.Response:
        async with answer_while_starting(listener, lambda: "load weights (2 of 2 ranks)"), httpx.AsyncClient() as client:
            await client.get(f"http://{address[0]}:{address[1]}/health")
            return await client.post(f"http://{address[0]}:{address[1]}/v1/completions", json={"prompt": "a" * 100_000})

    with listener:
        answer = asyncio.run(ask())
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["message"] == "the server is starting: load weights (2 of 2 ranks)"
        with socket.create_connection(address, timeout=5):
            listener.setblocking(True)
            listener.accept()[0].close()


def test_nonsense_and_silence_hurt_nobody() -> None:
    listener = bind("127.0.0.1", 0)

    async def talk(silent: socket.socket) -> bytes:
        async with answer_while_starting(listener, lambda: "x"):
            silent.connect(listener.getsockname())
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            answer = await reader.read(12)
            writer.close()
            return answer

    with listener, socket.socket() as silent:
        assert asyncio.run(talk(silent)) == b"HTTP/1.1 503"
        assert silent.recv(1) == b""
