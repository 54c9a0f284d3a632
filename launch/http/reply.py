"""Answering while listening: work for a client that goes away is cancelled, whether the answer is streamed or not.

Starlette notices a client's leaving only while it sends; a sequence that waits in a queue sends nothing. Knows no API.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from moesaic.launch.http.errors import ApiError

logger = logging.getLogger(__name__)

# nginx's status for a client that closed the request; nobody receives it.
CLIENT_GONE = 499
DONE = b"data: [DONE]\n\n"


def event(data: object, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response of `work`; it is cancelled when the client leaves. The body must have been read before."""
    done = await _race(work, request.receive)
    return Response(status_code=CLIENT_GONE) if done is None else done


async def _race(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """The result of `work`, or None when the client left first."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_wait_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        # Cancelled work must have told the ranks before the request counts as ended.
        await asyncio.gather(working, gone, return_exceptions=True)


async def _wait_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from `events` (bytes, complete events). A failure before the first one has its own HTTP
    status; a
    later one is an event with an `error`, and then the end."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self._events = events
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _race(self._send_all(scope, receive, send), receive)

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            try:
                first = await anext(events, None)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if first is not None:
                await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except ApiError as error:
                await send({"type": "http.response.body", "body": event(error.body()) + DONE, "more_body": True})
            except Exception:
                # The status is sent: only an event can still tell the client.
                logger.exception("a stream has failed")
                fault = ApiError(500, "internal error", code="internal_error")
                await send({"type": "http.response.body", "body": event(fault.body()) + DONE, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
