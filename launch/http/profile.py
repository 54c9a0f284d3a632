"""/start_profile and /stop_profile: the timeline of the ranks' steps into files, one per rank. SGLang's fields.

What is recorded is always the same (every operation, wait and communication, on the CPU and on the device), so SGLang's fields that
ask for less are taken as satisfied, and those that ask for something else are refused by name.
"""

from __future__ import annotations

import contextlib
import time

import msgspec
from fastapi import APIRouter, Request, Response

from moesaic.launch.engine.messages import ProfileOptions
from moesaic.launch.http.admin import BOTH, run_command
from moesaic.launch.http.body import parse_body
from moesaic.launch.http.errors import bad_request
from moesaic.launch.http.services import Services

ACTIVITIES = ("CPU", "GPU")
STOP_SECONDS = 120.0
"""A long recording takes a while to write."""


class ProfileBody(msgspec.Struct, kw_only=True):
    """SGLang's own client sends numbers as text."""

    output_dir: str | None = None
    num_steps: int | str | None = None
    profile_id: str | None = None
    profile_prefix: str | None = None
    activities: list[str] | None = None
    start_step: int | str | None = None
    profile_by_stage: bool | None = None
    profile_stages: list[str] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None
    merge_profiles: bool | None = None


# By name of a field: why it can't be honoured when it asks for something.
_REFUSED = {
    "start_step": "steps can't be skipped before the recording: send /start_profile when it is to begin",
    "profile_by_stage": "prefill and decode steps are recorded together: `moesaic timeline --step N` tells them apart",
    "profile_stages": "prefill and decode steps are recorded together: `moesaic timeline --step N` tells them apart",
    "with_stack": "call stacks are not recorded",
    "record_shapes": "shapes of tensors are not recorded",
    "merge_profiles": "each rank has its own file: give all of them to `moesaic timeline`",
}


def make_router(services: Services) -> APIRouter:
    router = APIRouter()

    @router.api_route("/start_profile", methods=BOTH)
    async def start_profile(request: Request) -> Response:
        options = _options(await request.body())
        ends = "until /stop_profile" if options.num_steps is None else f"for {options.num_steps} steps"
        return await run_command(services, "start_profile", f"recording a timeline {ends}", profile=options)

    @router.api_route("/stop_profile", methods=BOTH)
    async def stop_profile() -> Response:
        return await run_command(services, "stop_profile", "the timeline is written", timeout=STOP_SECONDS)

    return router


def _options(data: bytes) -> ProfileOptions:
    """Raises ApiError 400 naming the field."""
    body = ProfileBody() if data.strip() in (b"", b"null") else parse_body(data, ProfileBody)
    for name, reason in _REFUSED.items():
        if getattr(body, name):
            raise bad_request(f"{name}: {reason}", name)
    for activity in body.activities or ():
        if activity not in ACTIVITIES:
            raise bad_request(f"activities: {activity!r} can't be recorded, only {' and '.join(ACTIVITIES)}", "activities")
    # As in SGLang: a name that no earlier profile has.
    names = (body.profile_prefix, body.profile_id or f"{time.time():.6f}")
    return ProfileOptions(
        output_dir=body.output_dir or "", num_steps=_num_steps(body.num_steps), profile_id="-".join(filter(None, names))
    )


def _num_steps(value: int | str | None) -> int | None:
    if value is None:
        return None
    number = 0
    with contextlib.suppress(ValueError):
        number = int(value)
    if number < 1:
        raise bad_request(
            f"num_steps must be an integer of 1 or more or left out (until /stop_profile), got {value!r}", "num_steps"
        )
    return number
