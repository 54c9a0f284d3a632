"""/start_profile and /stop_profile: SGLang's bodies, and the paths of all ranks' files in the answer."""

from __future__ import annotations

from typing import Any

import pytest
from http_server import HttpServer

from moesaic.launch.engine.messages import Control, ProfileOptions


def _told(server: HttpServer) -> list[Control]:
    """The last command that each rank got."""
    return [[message for message in rank.received if isinstance(message, Control)][-1] for rank in server.ranks]


def test_every_rank_is_told_and_every_file_is_named(server: HttpServer) -> None:
    answer = server.post("/start_profile", {"output_dir": "/tmp/x", "num_steps": 5, "profile_id": "mine"})

    assert answer.status_code == 200
    assert answer.json() == {
        "success": True,
        "message": "recording a timeline for 5 steps",
        "ranks": ["start_profile by 0", "start_profile by 1"],
        "files": ["mine-rank0.trace.json", "mine-rank1.trace.json"],
    }
    options = ProfileOptions(output_dir="/tmp/x", num_steps=5, profile_id="mine")
    assert [(control.command, control.profile) for control in _told(server)] == [("start_profile", options)] * 2


def test_stopping_needs_no_body(server: HttpServer) -> None:
    for answer in (server.http.post("/stop_profile"), server.http.get("/stop_profile")):
        assert answer.status_code == 200
        assert [control.command for control in _told(server)] == ["stop_profile"] * 2


@pytest.mark.parametrize("body", [b"", b"null", b"{}"])
def test_without_wishes_it_runs_until_it_is_stopped_under_a_name_of_its_own(server: HttpServer, body: bytes) -> None:
    names = set()
    for _ in range(2):
        answer = server.http.post("/start_profile", content=body)
        assert answer.json()["message"] == "recording a timeline until /stop_profile"
        options = _told(server)[0].profile
        assert options is not None
        assert (options.output_dir, options.num_steps) == ("", None)
        names.add(options.profile_id)
    assert len(names) == 2
    assert server.http.get("/start_profile").status_code == 200


def test_the_body_of_sglangs_own_client_is_taken(server: HttpServer) -> None:
    body = {
        "output_dir": "/tmp/x",
        "num_steps": "5",
        "activities": ["CPU", "GPU"],
        "profile_by_stage": False,
        "merge_profiles": False,
        "profile_prefix": "run",
        "with_stack": None,
        "record_shapes": False,
        "profile_stages": None,
    }
    assert server.post("/start_profile", body).status_code == 200
    options = _told(server)[0].profile
    assert options is not None
    assert options.num_steps == 5
    assert options.profile_id.startswith("run-")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("activities", ["CPU", "MEM"], "'MEM' can't be recorded, only CPU and GPU"),
        ("with_stack", True, "call stacks are not recorded"),
        ("record_shapes", True, "shapes of tensors are not recorded"),
        ("profile_by_stage", True, "recorded together"),
        ("profile_stages", ["decode"], "recorded together"),
        ("merge_profiles", True, "give all of them to `moesaic timeline`"),
        ("start_step", 3, "send /start_profile when it is to begin"),
        ("num_steps", 0, "an integer of 1 or more"),
        ("num_steps", "many", "an integer of 1 or more"),
        ("output_dir", 3, "Expected `str | null`"),
    ],
)
def test_what_can_not_be_honoured_is_refused_by_name(server: HttpServer, field: str, value: Any, words: str) -> None:
    before = len(server.ranks[0].received)
    answer = server.post("/start_profile", {field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], words in error["message"]) == (field, True), error
    assert len(server.ranks[0].received) == before


def test_a_ranks_refusal_is_a_400_that_names_it(server: HttpServer) -> None:
    server.ranks[1].refuse_control = True
    answer = server.http.post("/stop_profile")
    server.ranks[1].refuse_control = False
    assert answer.status_code == 400
    assert "DP rank 1: stop_profile by 1" in answer.json()["error"]["message"]
