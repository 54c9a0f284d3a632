"""How benchmarks/h200.py takes time, and the ceilings that it holds floors against. Knows no cases.

Medians over replays of a CUDA graph of several calls. A call that can't be captured is queued several times behind a sleeping GPU,
so that the CPU is ahead and its launches cost nothing, unless the call itself waits for the GPU. `cold_us` empties the L2 cache
before every call and takes away what the emptying costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CALLS, REPLAYS = 10, 15
LONG_S, FEW = 0.02, 3
"""A call that takes longer is timed alone, and a few times only."""
FLUSH_BYTES = 256 * 2**20
COPY_BYTES, PRODUCT_SIZE = 2**31, 8192
"""What the ceilings are measured with: bytes copied, rows and columns of square matrices."""
MOST_SLEEP_S, CLOCK_HZ = 0.1, 2e9
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Measured: bytes per second of a copy (read and written), operations per second of large matrix products."""

    copy: float
    bf16: float
    fp8: float

    def __str__(self) -> str:
        return f"copy {self.copy / 1e12:.2f} TB/s, bf16 {self.bf16 / 1e12:.0f} TFLOP/s, fp8 {self.fp8 / 1e12:.0f} TFLOP/s"


def measure_ceilings() -> Ceilings:
    """On random data: a GPU multiplies zeros faster."""
    size = PRODUCT_SIZE
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16_us = warm_us(lambda: a @ b.t())
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    fp8_us = warm_us(lambda: torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
    flops = 2 * size**3
    return Ceilings(copy=2 * COPY_BYTES / _copy_us(COPY_BYTES) * 1e6, bf16=flops / bf16_us * 1e6, fp8=flops / fp8_us * 1e6)


def _copy_us(num_bytes: int) -> float:
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return warm_us(lambda: target.copy_(source))


def warm_us(call: Call, *, captured: bool = True) -> float:
    """Microseconds of one call whose tensors may lie in the L2 cache."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return _median_us(_captured(call)) if captured else _queued_us(call)


def cold_us(call: Call) -> float:
    """Microseconds of one call after the L2 cache was filled with something else. The call must have been warmed up."""
    other = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def both() -> None:
        other.zero_()
        call()

    return max(_median_us(_captured(both)) - _median_us(_captured(other.zero_)), 0.0)


def _captured(call: Call) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    return graph.replay


def _queued_us(call: Call) -> float:
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    calls, replays = (CALLS, REPLAYS) if time.perf_counter() - begin < LONG_S else (1, FEW)

    def several() -> None:
        for _ in range(calls):
            call()

    begin = time.perf_counter()
    several()
    cpu_s = time.perf_counter() - begin
    torch.cuda.synchronize()
    return _median_us(several, calls, replays, sleep_s=min(1.5 * cpu_s, MOST_SLEEP_S))


def _median_us(run: Call, calls: int = CALLS, replays: int = REPLAYS, *, sleep_s: float = 0.0) -> float:
    """Of `run`, which makes so many calls, per call."""
    spans = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if sleep_s:
            torch.cuda._sleep(int(sleep_s * CLOCK_HZ))
        begin.record()
        run()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end) * 1000 / calls)
    return statistics.median(spans)
