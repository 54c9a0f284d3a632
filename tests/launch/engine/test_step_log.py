"""The log line of a DP rank."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.launch.engine.messages import LoadReport
from moesaic.launch.engine.plan import Plan
from moesaic.launch.engine.step_log import StepLog

LOAD = LoadReport(
    dp_rank=3,
    num_running_reqs=2,
    num_waiting_reqs=5,
    num_used_tokens=50,
    max_total_num_tokens=200,
    num_waiting_tokens=7,
    gen_throughput=12.5,
    cache_hit_rate=0.5,
    num_retracted_reqs=1,
)


def plan(num_decode: int) -> Plan:
    return Plan(decode_slots=np.arange(num_decode), chunks=())


def test_a_line_comes_every_interval_of_steps_with_work(caplog: pytest.LogCaptureFixture) -> None:
    log = StepLog(3)
    with caplog.at_level("INFO"):
        for num_decode in (2, 0, 2, 0, 2, 2):
            log.step(plan(num_decode), LOAD)

    (line,) = caplog.messages
    assert line.startswith("Decode batch. dp_rank: 3, #running-req: 2, #token: 50, token usage: 0.25, ")
    assert "gen throughput (token/s): 12.50, #queue-req: 5, #new-seq: 0, #new-token: 0" in line
