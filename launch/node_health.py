"""The health endpoint of a node other than 0: `GET /health` says whether its ranks run. Standard library only.

Knows no ranks: it is given a function that reports.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """`healthy` decides 200 or 503; `details` is the JSON body."""

    healthy: bool
    details: dict[str, Any]


class NodeHealthServer:
    """Serves on `sock`, which listens already, from a thread of its own, while its context lasts."""

    def __init__(self, sock: socket.socket, report: Callable[[], NodeState]) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                _answer(self, report)

            def log_message(self, format: str, *args: object) -> None:
                """Health probes are not news."""

        self._server = ThreadingHTTPServer(sock.getsockname()[:2], Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = sock
        sock.setblocking(True)
        self._thread = threading.Thread(target=self._server.serve_forever, name="node health", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def _answer(request: BaseHTTPRequestHandler, report: Callable[[], NodeState]) -> None:
    if request.path not in ("/health", "/ready"):
        request.send_error(404, "this node serves GET /health only; requests go to node 0")
        return
    state = report()
    body = json.dumps(state.details).encode()
    request.send_response(200 if state.healthy else 503)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
