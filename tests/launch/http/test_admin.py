"""What routers, dashboards and operators ask for."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
from http_server import HttpServer
from prometheus_client.parser import text_string_to_metric_families

from moesaic.launch.engine.messages import OverlapProfile
from moesaic.overlap.calibration import Measurement


def test_health_and_ready(server: HttpServer) -> None:
    for path in ("/health", "/health_generate", "/ready"):
        assert server.http.get(path).status_code == 200


def test_server_info_has_what_the_router_reads(server: HttpServer) -> None:
    info = server.http.get("/server_info").json()
    assert info == {**server.http.get("/get_server_info").json()}
    assert info["dp_size"] == 2
    assert info["model_path"] == server.config.model_path
    assert info["served_model_name"] == "echo"
    state = info["internal_states"][0]
    assert state["effective_max_running_requests_per_dp"] == 256
    assert state["memory_usage"]["token_capacity"] == 200_000
    assert "last_gen_throughput" in state


def test_server_info_shows_settings_and_resolution_but_no_key(model_path: Path) -> None:
    settings = {"server_args": {"tp_size": 8, "api_key": "sekrit"}, "resolution": ({"capability": "graphs"},)}
    with HttpServer(model_path, api_key="sekrit", **settings) as server:
        answer = server.http.get("/server_info", headers={"Authorization": "Bearer sekrit"})
        assert "sekrit" not in answer.text
        assert answer.json()["resolution"] == [{"capability": "graphs"}]


def test_server_info_shows_what_the_ranks_measured_beside_the_choice(model_path: Path) -> None:
    rows = ({"capability": "device", "chosen": "cpu"}, {"capability": "two-batch overlap", "chosen": "on"})
    with HttpServer(model_path, resolution=rows) as server:
        assert server.http.get("/server_info").json()["resolution"] == list(rows)
        ready = server.client.ready[0]
        points = {"prefill": (Measurement(num_tokens=64, straight_s=2.0, split_s=1.0),), "decode": ()}
        profile = OverlapProfile(hardware="2 x Xeon", date="2026-10-01", layout={"ep_size": 2}, modes=points)
        server.client.ready[0] = msgspec.structs.replace(ready, overlap_profile=profile)
        device, overlap = server.http.get("/server_info").json()["resolution"]
    assert device == rows[0]
    assert overlap["chosen"] == "on"
    assert overlap["calibration"]["hardware"] == "2 x Xeon"
    assert overlap["calibration"]["modes"]["prefill"] == [{"num_tokens": 64, "straight_s": 2.0, "split_s": 1.0}]
    assert overlap["calibration"]["split_from_tokens_per_dp_rank"] == {"prefill": 64, "decode": None}


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(server: HttpServer, path: str) -> None:
    info = server.http.get(path).json()
    assert info["is_generation"] is True
    assert info["model_type"] == "deepseek_v3"
    assert info["architectures"] == ["DeepseekV3ForCausalLM"]
    assert info["tokenizer_path"] == server.config.model_path


def test_loads(server: HttpServer) -> None:
    assert [set(load) for load in server.http.get("/get_load").json()] == [
        {"dp_rank", "num_reqs", "num_waiting_reqs", "num_tokens"}
    ] * 2
    loads = server.http.get("/v1/loads").json()
    assert {"timestamp", "version", "loads"} == set(loads)
    assert [load["dp_rank"] for load in loads["loads"]] == [0, 1]
    assert loads["loads"][0]["max_total_num_tokens"] == 100_000


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("/flush_cache", "flush_cache"),
        ("/start_expert_distribution_record", "start_record"),
        ("/stop_expert_distribution_record", "stop_record"),
        ("/dump_expert_distribution_record", "dump_record"),
    ],
)
def test_commands_reach_every_dp_rank(server: HttpServer, path: str, command: str) -> None:
    for answer in (server.http.post(path), server.http.get(path)):
        assert answer.status_code == 200
        assert answer.json()["ranks"] == [f"{command} by 0", f"{command} by 1"]
    server.ranks[1].refuse_control = True
    answer = server.http.post(path)
    server.ranks[1].refuse_control = False
    assert answer.status_code == 400
    assert "DP rank 1" in answer.json()["error"]["message"]


def test_an_answer_does_not_wait_for_the_clients_acknowledgement(server: HttpServer) -> None:
    """Nagle's algorithm would hold the second write of each for 40 ms."""

    def seconds() -> float:
        started = time.perf_counter()
        server.http.get("/v1/models")
        return time.perf_counter() - started

    assert sorted(seconds() for _ in range(9))[4] < 0.03


def test_requests_are_logged_from_the_moment_they_are_asked_for(server: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}, "rid": "logged"}
    with caplog.at_level("INFO", logger="moesaic.launch.http.request_log"):
        server.generate(**body)
        assert not caplog.messages
        for level in (0, 1, 2):
            assert server.post("/configure_logging", {"log_requests_level": level}).json()["log_requests"] is True
            server.generate(**body)
        assert server.post("/configure_logging", {"log_requests": False}).json()["log_requests_level"] is None
        server.generate(**body)
    received, finished = caplog.messages[0::2], caplog.messages[1::2]
    assert len(received) == len(finished) == 3
    assert all(line.startswith("Receive: rid='logged' dp_rank=") and "prompt_tokens=2" in line for line in received)
    assert ["sampling_params" in line for line in received] == [False, True, True]
    assert ["input_ids=[5, 6]" in line for line in received] == [False, False, True]
    assert all("finish_reason=length completion_tokens=2" in line for line in finished)


def test_metrics_count_what_happened(server: HttpServer) -> None:
    def read() -> dict[str, float]:
        text = server.http.get("/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.name + sample.labels.get("dp_rank", ""): sample.value for sample in samples}

    before = read()
    server.generate(input_ids=[[5, 6, 7], [8]], sampling_params={"max_new_tokens": 4}, data_parallel_rank=1)
    after = read()
    grown = {name: after[name] - before[name] for name in after if name in before}
    assert grown["moesaic:prompt_tokens_total"] == 4
    assert grown["moesaic:cached_tokens_total"] == 2  # an echo rank has one token of each prompt
    assert grown["moesaic:generation_tokens_total"] == 8
    assert grown["moesaic:num_requests_total"] == 2
    assert grown["moesaic:num_aborted_requests_total"] == 0
    assert grown["moesaic:time_to_first_token_seconds_count"] == 2
    assert grown["moesaic:inter_token_latency_seconds_count"] == 6
    assert grown["moesaic:e2e_request_latency_seconds_count"] == 2
    assert grown["moesaic:queue_time_seconds_count"] == 2
    gauges = "num_running_reqs num_queue_reqs num_used_tokens max_total_num_tokens token_usage gen_throughput cache_hit_rate"
    assert all(f"moesaic:{name}{rank}" in after for name in (*gauges.split(), "num_retracted_reqs") for rank in (0, 1))
