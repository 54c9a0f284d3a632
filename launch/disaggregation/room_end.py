"""Making a rank's end of a room for a request, and telling the client how it failed. Shared by both roles; knows no queues."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from moesaic.launch.disaggregation.protocol import RoomError, TransferState
from moesaic.launch.disaggregation.room_list import Entry
from moesaic.launch.disaggregation.transfer import Receiver, Sender
from moesaic.launch.engine.messages import Bootstrap, GenerateRequest
from moesaic.launch.engine.results import Results

logger = logging.getLogger(__name__)

EndT = TypeVar("EndT", bound=Sender | Receiver)

GIVEN_UP = "the client has given it up"


@dataclass(eq=False, kw_only=True)
class RoomEntry(Entry, Generic[EndT]):
    """`end` None: the room was refused here, as `refusal` says."""

    end: EndT | None
    refusal: str = ""

    @property
    def state(self) -> TransferState:
        return TransferState.FAILED if self.end is None else self.end.state

    def give_up(self, reason: str) -> None:
        """Nothing happens to a room that has ended."""
        if self.end is not None:
            self.end.abort(reason)


def bootstrap_of(request: GenerateRequest) -> Bootstrap:
    """Where the request's prefill and decode meet. The HTTP side lets no request through that doesn't say."""
    assert request.bootstrap is not None, f"request {request.rid} has no room"
    return request.bootstrap


def open_room(make: Callable[[], EndT], check: Callable[[], None]) -> tuple[EndT | None, str]:
    """(the end, "") or (None, why the room was refused).

    Raises ValueError as `check` does: the request can never run here. Then the other side is told, as far as it can be.
    """
    try:
        end = make()
    except RoomError as error:
        return None, str(error)
    try:
        check()
    except ValueError as error:
        end.abort(str(error))
        raise
    return end, ""


def report_failure(results: Results, entry: RoomEntry[EndT], failed_rank: int) -> str:
    """End the request at the client, with the reason of this rank or, where it has none, the name of the rank that failed."""
    room = bootstrap_of(entry.request).room
    if entry.end is None:
        results.transfer_failed(entry.rid, "room", entry.refusal)
        return entry.refusal
    failure = entry.end.failure
    if failure is None:
        message = f"room {room}: attention-TP rank {failed_rank} of this DP group has failed; its log says why"
        results.transfer_failed(entry.rid, "lost", message)
        return message
    logger.warning("%s", failure)
    results.transfer_failed(entry.rid, failure.kind, str(failure))
    return str(failure)
