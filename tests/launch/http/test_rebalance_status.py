"""What clients, probes and Prometheus see of a rebalance that goes wrong and recovers."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from http_server import HttpServer, wait_for

from moesaic.launch.engine.messages import RebalanceStatus


def _status(**known: Any) -> RebalanceStatus:
    zero: dict[str, Any] = {
        field.name: {"str": "", "int": 0, "float": 0.0, "bool": False}[str(field.type)] for field in fields(RebalanceStatus)
    }
    return RebalanceStatus(**{**zero, **known})


def test_one_degraded_rank_shows_in_health_server_info_and_metrics_while_requests_are_served(model_path: Path) -> None:
    with HttpServer(model_path, dp_size=2) as server:
        assert server.http.get("/health").json() == {"status": "ok"}
        assert server.http.get("/server_info").json()["internal_states"][0]["rebalance"] is None
        assert "eplb" not in server.http.get("/metrics").text

        cause = "move of sparse layer 3: rank 1 stalled"
        server.ranks[0].rebalance = _status(phase="idle", committed_cycles=4, last_balancedness=0.9)
        server.ranks[1].rebalance = _status(phase="drain", abandoned_cycles=1, degraded=True, last_cause=cause)
        wait_for(lambda: server.http.get("/health").json()["status"] == "degraded")
        assert server.http.get("/health").json()["rebalance"] == cause
        assert server.http.get("/server_info").json()["internal_states"][0]["rebalance"]["last_cause"] == cause
        assert 'moesaic:eplb_degraded{model_name="echo"} 1.0' in server.http.get("/metrics").text
        assert server.generate(input_ids=[5], sampling_params={"max_new_tokens": 1})["output_ids"] == [5]

        server.ranks[1].rebalance = _status(phase="idle", committed_cycles=5, abandoned_cycles=1, last_cause=cause)
        wait_for(lambda: server.http.get("/health").json() == {"status": "ok"})
        metrics = server.http.get("/metrics").text
        assert 'moesaic:eplb_cycles_total{model_name="echo",outcome="committed"} 4.0' in metrics
        assert 'moesaic:eplb_balancedness{forward_mode="all",model_name="echo"} 0.9' in metrics
