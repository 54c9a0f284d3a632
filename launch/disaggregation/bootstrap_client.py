"""How ranks talk to a bootstrap server: prefill ranks register, decode ranks ask for an instance's layout.

Blocking calls over the standard library's HTTP client; knows no rooms.
"""

from __future__ import annotations

import http.client
import time
from urllib.parse import urlencode

import msgspec

from moesaic.launch.disaggregation.bootstrap import PrefillTopology, Registration
from moesaic.launch.disaggregation.protocol import LayoutMismatchError

REQUEST_S = 3.0
RETRY_S = 0.2


class BootstrapError(ConnectionError):
    """The bootstrap server can't be reached, or can't answer yet. Names the server."""


class BootstrapUnreachableError(BootstrapError):
    """Nobody answers there: a server that is starting, or is gone."""


def register_rank(address: str, rank: Registration, seconds: float = 60.0) -> None:
    """Register with the bootstrap server at `host:port`, which may still be starting.

    Raises LayoutMismatchError when the server refuses, BootstrapError when it has not been reached within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            status, body = _request(address, "PUT", "/route", msgspec.json.encode(rank))
            break
        except BootstrapError as error:
            if time.monotonic() + RETRY_S > deadline:
                raise BootstrapError(f"{error}; tried for {seconds:g} s") from error
            time.sleep(RETRY_S)
    if status != 200:
        raise LayoutMismatchError(f"the bootstrap server at {address} refuses this rank ({status}): {body.decode()}")


def fetch_topology(address: str) -> PrefillTopology:
    """The prefill instance behind a bootstrap server, asked once. Raises BootstrapError when it can't be had now."""
    wanted = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
    status, body = _request(address, "GET", f"/route?{urlencode(dict.fromkeys(wanted, -1))}")
    if status != 200:
        raise BootstrapError(f"the bootstrap server at {address} is not ready ({status}): {body.decode(errors='replace')[:500]}")
    try:
        return msgspec.json.decode(body, type=PrefillTopology)
    except msgspec.MsgspecError as error:
        raise BootstrapError(f"what answers at {address} is no bootstrap server of moesaic: {error}") from error


def _request(address: str, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise BootstrapError(f"the bootstrap server's address must be host:port, got {address!r}")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=REQUEST_S)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise BootstrapUnreachableError(
            f"the bootstrap server at {address} can't be reached: {error or type(error).__name__}"
        ) from error
    finally:
        connection.close()
