"""The rooms of a request on a prefill or decode instance: `bootstrap_host`, `bootstrap_port` and `bootstrap_room` of its body.

A PD router gives the same fields to a prefill and a decode server. For a batch they may be lists: one entry per sequence, or one
per prompt, whose n sequences then get rooms that follow from it, the same on both sides. Knows no API's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec

from moesaic.launch.engine.messages import MAX_ROOM, WARMUP_HOST, Bootstrap
from moesaic.launch.http.config import HttpConfig
from moesaic.launch.http.errors import bad_request
from moesaic.launch.http.job import Job

_STRIDE = 0x1E3779B97F4A7C15
"""Between the rooms of one prompt's sequences: rooms that a router counts up don't meet them."""


class RoomFields(msgspec.Struct, kw_only=True):
    """For a body to inherit. `disagg_prefill_dp_rank`: the DP rank that prefills (room % dp_size)."""

    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    disagg_prefill_dp_rank: Annotated[int, msgspec.Meta(ge=0, le=65535)] | None = None


@dataclass(frozen=True, kw_only=True)
class _Row:
    host: object
    port: object
    room: object


def with_rooms(config: HttpConfig, body: RoomFields, jobs: Sequence[Job], num_prompts: int) -> list[Job]:
    """Each job with its room, and on prefill pinned to the room's DP rank. ApiError 400 for fields that are missing or wrong."""
    values = {"bootstrap_host": body.bootstrap_host, "bootstrap_port": body.bootstrap_port, "bootstrap_room": body.bootstrap_room}
    if config.role == "null":
        for name, value in values.items():
            if value is not None:
                raise bad_request(f"{name}: this server is not disaggregated, so it must be null", name)
        return list(jobs)
    if body.bootstrap_room is None:
        raise bad_request(missing_room(config), "bootstrap_room")
    columns = [_spread(value, name, len(jobs), num_prompts) for name, value in values.items()]
    rows = [_Row(host=host, port=port, room=room) for host, port, room in zip(*columns, strict=True)]
    per_prompt = len(jobs) // num_prompts
    listed = isinstance(body.bootstrap_room, list) and len(body.bootstrap_room) == len(jobs)
    return [
        _with_room(config, body, job, row, 0 if listed else index % per_prompt)
        for index, (job, row) in enumerate(zip(jobs, rows, strict=True))
    ]


def missing_room(config: HttpConfig) -> str:
    """What a request without a room is told."""
    return (
        f"bootstrap_room is missing: this is a {config.role} instance; send requests to the router in front of it "
        "(`moesaic router`), which gives each one a room"
    )


def _spread(value: object, name: str, num_jobs: int, num_prompts: int) -> list[object]:
    if not isinstance(value, list):
        return [value] * num_jobs
    if len(value) == num_jobs:
        return value
    if len(value) != num_prompts:
        raise bad_request(f"{name} has {len(value)} entries for {num_prompts} prompts and {num_jobs} sequences", name)
    return [entry for entry in value for _ in range(num_jobs // num_prompts)]


def _with_room(config: HttpConfig, body: RoomFields, job: Job, row: _Row, place: int) -> Job:
    room, port = row.room, config.bootstrap_port if row.port is None else row.port
    if not isinstance(room, int) or isinstance(room, bool) or not 0 <= room <= MAX_ROOM:
        raise bad_request(f"bootstrap_room must be an integer between 0 and {MAX_ROOM}, got {room!r}", "bootstrap_room")
    if not isinstance(row.host, str) or not row.host:
        raise bad_request(f"bootstrap_host must name the prefill server's host, got {row.host!r}", "bootstrap_host")
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65535:
        raise bad_request(f"bootstrap_port must be a port or null, got {port!r}", "bootstrap_port")
    room = (room + place * _STRIDE) & MAX_ROOM
    prefill_dp_rank = job.dp_rank if body.disagg_prefill_dp_rank is None else body.disagg_prefill_dp_rank
    bootstrap = Bootstrap(host=row.host, port=port, room=room, prefill_dp_rank=prefill_dp_rank)
    if config.role == "decode" or row.host == WARMUP_HOST:
        return replace(job, bootstrap=bootstrap)
    return replace(job, bootstrap=bootstrap, dp_rank=room % config.dp_size if prefill_dp_rank is None else prefill_dp_rank)
