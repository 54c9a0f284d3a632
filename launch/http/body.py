"""Reading a request's JSON body into a msgspec struct; every failure is a 400 that names the field.

Knows JSON and HTTP bodies, nothing of what the fields mean.
"""

from __future__ import annotations

import json
import math
import re
from typing import TypeVar

import msgspec
from fastapi import Request

from moesaic.launch.http.errors import ApiError, bad_request
from moesaic.launch.http.foreign_fields import refuse_foreign

T = TypeVar("T", bound=msgspec.Struct)

MAX_BODY_BYTES = 64 << 20
_MISSING = re.compile(r"missing required field `(\w+)`")
_PATH = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`")


async def read_body(request: Request, kind: type[T]) -> T:
    return parse_body(await _read_bytes(request), kind)


async def _read_bytes(request: Request) -> bytes:
    """The whole body; refused as soon as it is too long, so that nobody can fill the memory."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"the request body is longer than {MAX_BODY_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def parse_body(data: bytes, kind: type[T]) -> T:
    """`data` as a `kind`: a msgspec struct whose unknown fields are tolerated, as routers add some, but for those that would change
    the answer.
    """
    try:
        body = msgspec.json.decode(data, type=kind)
        refuse_foreign(data, frozenset(body.__struct_fields__))
        return body
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not valid UTF-8: {error.reason}") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except msgspec.DecodeError as error:
        _refuse_non_finite(data)
        raise bad_request(f"the body is not valid JSON: {error}") from None


def _wrong_type(message: str) -> ApiError:
    missing = _MISSING.search(message)
    if missing is not None:
        return bad_request(f"{missing.group(1)} is missing", missing.group(1))
    path = _PATH.search(message)
    if path is None or not path.group(1):
        return bad_request(f"the body must be a JSON object: {message}")
    field = path.group(1)
    return bad_request(f"{field}: {_PATH.sub('', message)}", param=field)


def _refuse_non_finite(data: bytes) -> None:
    """Python clients write NaN and Infinity, which are not JSON: say which field, instead of a byte offset."""

    def check(pairs: list[tuple[str, object]]) -> None:
        for key, value in pairs:
            if isinstance(value, float) and not math.isfinite(value):
                raise bad_request(f"{key} must be a finite number, got {value}", param=key)

    try:
        json.loads(data, object_pairs_hook=check)
    except (ValueError, RecursionError):
        return
