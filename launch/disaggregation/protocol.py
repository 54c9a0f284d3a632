"""What prefill and decode instances say to each other about a room: states, layouts, control messages, failures.

Knows no sockets and no memory. The control messages travel between one decode rank and one prefill rank (`link.py`), in this order:

    decode                         prefill
    Hello (who, layout)       ->
                              <-   Welcome (who, layout, how to read its memory) | Refused
    Expect (room)             ->
    Open (room)               ->
                              <-   Pages (the next complete pages), as often as there are chunks
                              <-   Last (number of pages, first token and what rides along)
    Done (all has been read)  ->
                              <-   Closed (the pages were held until now: what was read is right)

`Abort` ends a room from either side at any time. Without `Closed` a room never succeeds, so a prefill rank may give up a room and
reuse its pages at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import msgspec

from moesaic.launch.engine import messages

PROTOCOL_VERSION = 1
MAX_ROOM, WARMUP_HOST = messages.MAX_ROOM, messages.WARMUP_HOST


class TransferState(IntEnum):
    """Where a room stands. Monotone; FAILED and SUCCESS are final.

    On prefill: BOOTSTRAPPING until every decode rank has opened the room, WAITING until its first pages, then TRANSFERRING.
    On decode: BOOTSTRAPPING until its prefill ranks are known and reached, WAITING for the first pages, TRANSFERRING from then on.
    """

    FAILED = 0
    BOOTSTRAPPING = 1
    WAITING = 2
    TRANSFERRING = 3
    SUCCESS = 4

    @property
    def final(self) -> bool:
        return self in (TransferState.FAILED, TransferState.SUCCESS)


def group_state(states: Iterable[TransferState]) -> TransferState:
    """What a room's state is for an attention-TP group: that of the rank which is least far, FAILED if any has failed."""
    return min(states)


FailureKind = Literal["aborted", "deadline", "lost", "refused", "corrupt"]
"""aborted: somebody gave the request up. deadline: stuck for too long. lost: the other side is gone. refused: the other side won't.
corrupt: what arrived is not what was sent."""


class TransferError(RuntimeError):
    """A room that failed. The message names instance, rank, room and state; `kind` says which answer a client gets."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind


class RoomError(ValueError):
    """A room that a request may not use: not a room number, or used before."""


class LayoutMismatchError(ValueError):
    """Two instances, or two ranks of one, whose KV can't be exchanged. Names both values and the flag."""


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Seconds that a room may stay in a state; in TRANSFERRING: without progress."""

    bootstrapping: float = 120.0
    waiting: float = 300.0
    transferring: float = 60.0

    def of(self, state: TransferState) -> float:
        limits = {
            TransferState.BOOTSTRAPPING: self.bootstrapping,
            TransferState.WAITING: self.waiting,
            TransferState.TRANSFERRING: self.transferring,
        }
        return limits[state]


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """An instance's parallel layout and the shape of its KV. Sizes in ranks, tokens and bytes (bytes_per_token: of all layers)."""

    model_id: str
    tp_size: int
    dp_size: int
    ep_size: int
    page_size: int
    kv_dtype: str
    bytes_per_token: int
    num_layers: int

    @property
    def attn_tp_size(self) -> int:
        return self.tp_size // self.dp_size


_SAME_KV = (
    ("page_size", "page size", "start both with the same --page-size"),
    ("kv_dtype", "KV dtype", "start both with the same --dtype and --kv-cache-dtype"),
    ("model_id", "model", "serve the same --model-path on both"),
    ("num_layers", "number of layers", "serve the same --model-path on both"),
    ("bytes_per_token", "KV bytes per token", "serve the same --model-path with the same --dtype and --kv-cache-dtype on both"),
)


def check_same_kv(prefill: KVLayout, decode: KVLayout) -> None:
    """Raises LayoutMismatchError with both values where pages of the one can't be pages of the other. tp, dp and ep may differ."""
    for name, words, remedy in _SAME_KV:
        ours, theirs = getattr(prefill, name), getattr(decode, name)
        if ours != theirs:
            raise LayoutMismatchError(f"{words} differs: prefill has {ours}, decode has {theirs}; {remedy}")


def check_room(room: int) -> int:
    """The room itself. Raises RoomError unless it is in [0, 2^63)."""
    if not 0 <= room <= MAX_ROOM:
        raise RoomError(f"bootstrap_room must be between 0 and {MAX_ROOM}, got {room}")
    return room


# Control messages, decode to prefill


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The first message of a decode rank. `instance` is unique per start of a server."""

    version: int
    instance: str
    rank: int
    layout: KVLayout


class Expect(msgspec.Struct, frozen=True, kw_only=True, tag="expect"):
    """This decode rank has the request and will open the room once it has pages for it. If the rank dies, so does the room."""

    room: int


class Open(msgspec.Struct, frozen=True, kw_only=True, tag="open"):
    """This decode rank has pages for the room. `num_receivers`: decode ranks that open it on this prefill rank, `receiver` the
    attention-TP rank of this one. `first_index`: pages before it are on decode already. `checksum`: send checksums of the pages.
    """

    room: int
    receiver: int
    num_receivers: int
    first_index: int = 0
    checksum: bool = False


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """All announced pages that this rank wanted have been read."""

    room: int


# Prefill to decode


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """The answer to Hello. `memory`: what the transfer backend needs to read this rank's pages."""

    instance: str
    rank: int
    layout: KVLayout
    memory: bytes


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The answer to a Hello that can't be served; the connection ends."""

    reason: str


class Pages(msgspec.Struct, frozen=True, kw_only=True, tag="pages"):
    """Complete pages of a room: `numbers` in the prefill rank's pool, the first of them at `first_index` of the sequence.

    `checksums`: CRC-32 of each page over all layers, or empty.
    """

    room: int
    first_index: int
    numbers: list[int]
    checksums: list[int] = []


class Last(msgspec.Struct, frozen=True, kw_only=True, tag="last"):
    """All pages have been announced: `num_pages` in sum. `metadata`: first token and what rides along, see `handover.py`."""

    room: int
    num_pages: int
    metadata: bytes


class Closed(msgspec.Struct, frozen=True, kw_only=True, tag="closed"):
    """The answer to Done: the pages were held until all had been read."""

    room: int


# Both ways


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """The room has failed on the sender's side. No answer."""

    room: int
    kind: FailureKind
    reason: str


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    """A sign of life, sent while there is nothing else to say."""


ToPrefill = Hello | Expect | Open | Done | Abort | Ping
ToDecode = Welcome | Refused | Pages | Last | Closed | Abort | Ping
ControlMessage = ToPrefill | ToDecode

encoder = msgspec.msgpack.Encoder()
to_prefill_decoder: msgspec.msgpack.Decoder[ToPrefill] = msgspec.msgpack.Decoder(ToPrefill)
to_decode_decoder: msgspec.msgpack.Decoder[ToDecode] = msgspec.msgpack.Decoder(ToDecode)
