"""A device's clock tells when its streams computed, not when the CPU submitted."""

from __future__ import annotations

import time

import pytest
import torch

from moesaic.launch.engine.device_clock import device_clock
from moesaic.overlap.operations import Operation
from moesaic.overlap.timeline import Timeline


def test_the_cpu_needs_no_clock_of_its_own() -> None:
    assert device_clock(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_operation_on_a_gpu_is_submitted_long_before_it_has_run() -> None:
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    timeline = Timeline(rank=0, device_clock=device_clock(device))
    before = time.perf_counter_ns()
    timeline.enter(Operation("product", lambda state: None), 0)
    for _ in range(20):
        a @ a
    timeline.leave()
    torch.cuda.synchronize()
    after = time.perf_counter_ns()

    trace = timeline.trace()
    (submitted,), (computed,) = trace.row("cpu"), trace.row("computation")
    assert computed.duration_ns > 2 * submitted.duration_ns
    assert before - 1_000_000 < computed.start_ns < computed.end_ns < after + 1_000_000
