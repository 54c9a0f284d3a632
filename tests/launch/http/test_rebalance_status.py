"""What clients, probes and Prometheus see of a rebalance that goes wrong and recovers."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from http_server import HttpServer, wait_for

from moesaic.eplb.window_balance import Balance
from moesaic.launch.engine.messages import RebalanceStatus


def _status(**known: Any) -> RebalanceStatus:
    empty = {"str": "", "int": 0, "float": 0.0, "bool": False, "dict[str, Balance]": {}, "Balance | None": None}
    zero: dict[str, Any] = {field.name: empty[str(field.type)] for field in fields(RebalanceStatus)}
    return RebalanceStatus(**{**zero, **known})


def test_one_degraded_rank_shows_in_health_server_info_and_metrics_while_requests_are_served(model_path: Path) -> None:
    with HttpServer(model_path, dp_size=2) as server:
        assert server.http.get("/health").json() == {"status": "ok"}
        assert server.http.get("/server_info").json()["internal_states"][0]["rebalance"] is None
        assert "eplb" not in server.http.get("/metrics").text

        cause = "move of sparse layer 3: rank 1 stalled"
        server.ranks[0].rebalance = _status(phase="idle", committed_cycles=4)
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


def test_each_forward_modes_balancedness_stands_beside_bound_and_gap_and_without_tokens_there_is_none(model_path: Path) -> None:
    with HttpServer(model_path) as server:
        server.ranks[0].rebalance = _status(phase="idle")
        wait_for(lambda: "moesaic:eplb_cycles_total" in server.http.get("/metrics").text)
        assert "eplb_balancedness{" not in server.http.get("/metrics").text
        assert "eplb_predicted_balancedness" not in server.http.get("/metrics").text

        whole, decode = Balance(balancedness=0.75, bound=1.0), Balance(balancedness=0.5, bound=0.8)
        server.ranks[0].rebalance = _status(phase="idle", last_balances={"all": whole, "decode": decode}, last_predicted=whole)
        wait_for(lambda: "moesaic:eplb_balancedness{" in server.http.get("/metrics").text)
        lines = server.http.get("/metrics").text.splitlines()
        state = server.http.get("/server_info").json()["internal_states"][0]["rebalance"]
    assert {line for line in lines if line.startswith("moesaic:eplb_") and "balancedness" in line} == {
        'moesaic:eplb_balancedness{forward_mode="all",model_name="echo"} 0.75',
        'moesaic:eplb_balancedness{forward_mode="decode",model_name="echo"} 0.5',
        'moesaic:eplb_balancedness_bound{forward_mode="all",model_name="echo"} 1.0',
        'moesaic:eplb_balancedness_bound{forward_mode="decode",model_name="echo"} 0.8',
        'moesaic:eplb_balancedness_gap{forward_mode="all",model_name="echo"} 0.25',
        'moesaic:eplb_balancedness_gap{forward_mode="decode",model_name="echo"} 0.375',
        'moesaic:eplb_predicted_balancedness{model_name="echo"} 0.75',
        'moesaic:eplb_predicted_balancedness_gap{model_name="echo"} 0.25',
    }
    assert state["last_balances"]["decode"] == {"balancedness": 0.5, "bound": 0.8}
