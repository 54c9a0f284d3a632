"""What a client is told when something is wrong: one exception, one body shape (OpenAI's), for every endpoint.

The shape also serves native clients: SGLang's answer `{"error": {"message": ...}}` is a part of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from fastapi import Request, Response
from starlette.exceptions import HTTPException

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A refusal with its HTTP status. `param` names the request's field at fault, `code` is a stable word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        kind = _TYPES.get(self.status, "internal_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code or self.status}}

    def response(self) -> Response:
        return json_response(self.body(), status=self.status, headers=self.headers)


class EngineFailedError(Exception):
    """The ranks cannot serve: one died, or one is stuck. The message names rank and operation."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def step_failed(message: str) -> ApiError:
    """The step that ran a request failed; the engine goes on, so the same request may be sent again."""
    return ApiError(500, message, code="step_failed")


_TRANSFER_STATUS = {"room": 400, "deadline": 504, "lost": 503, "aborted": 503, "refused": 502, "corrupt": 502}


def transfer_failed(kind: str, message: str) -> ApiError:
    """A request failed on its way from prefill to decode; `message` names instance, rank, room and state."""
    return ApiError(_TRANSFER_STATUS[kind], message, param="bootstrap_room" if kind == "room" else None, code=f"transfer_{kind}")


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="engine_unavailable")


def json_response(data: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON by msgspec: it is many times faster than the default for long lists of token ids."""
    return Response(msgspec.json.encode(data), status, dict(headers or {}), "application/json")


async def handle_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def handle_http_exception(_request: Request, error: Exception) -> Response:
    """Starlette's own refusals (404 no such path, 405 wrong method) in the common shape."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def handle_crash(_request: Request, error: Exception) -> Response:
    """A fault of ours: the client learns its kind, the log has the traceback (starlette re-raises it)."""
    return ApiError(500, f"internal error: {type(error).__name__}", code="internal_error").response()
