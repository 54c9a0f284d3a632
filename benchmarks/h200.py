"""Every device kernel against its physical floor and its best importable peer: `python benchmarks/h200.py` on a Hopper GPU.

Needs torch, triton and numpy only, under 9 minutes. Copy bandwidth and matrix ceilings are measured first, in the same run; a
case's floor is the larger of its bytes over the one and its operations over the other. Results are checked against a reference,
and a second run against the first bit by bit, before anything is timed. Times are medians over replays of a CUDA graph of several
calls (or of events where a call waits for the CPU): small tensors lie in the L2 cache then, marked "L2". Without a GPU it says
what it would run and exits 0. Exit status 1: a result was wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import bare_import  # noqa: F401  before anything of moesaic
import torch
from h200_cases import Call, Case, Ready, all_cases
from h200_expert_cases import expert_cases
from h200_step_cases import step_cases
from torch import Tensor

DEADLINE_S = 500.0
CALLS_IN_GRAPH, REPLAYS = 10, 15
L2_BYTES = 50 * 2**20
COPY_BYTES, PRODUCT_SIZE = 2**31, 8192
"""What the ceilings are measured with: bytes copied, rows and columns of square matrices."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Measured: bytes per second of a copy (read and written), operations per second of large matrix products."""

    copy: float
    bf16: float
    fp8: float


@dataclass(kw_only=True)
class Result:
    """One case. `floor_share` is floor / time: 1 is as fast as the machine can. `problem` says why there is no time."""

    name: str
    size: str
    floor_us: float
    bound: str
    time_us: float | None = None
    floor_share: float | None = None
    error: float | None = None
    peers_us: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problem: str | None = None
    is_wrong: bool = False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/h200.py", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--only", metavar="WORD", help="only cases with this word in their name")
    parser.add_argument("--quick", action="store_true", help="one size of every kernel")
    parser.add_argument("--output", type=Path, default=Path("h200-report"), help="folder of report.json and report.md")
    arguments = parser.parse_args()
    word = arguments.only or ""
    cases = [
        case for case in all_cases() + step_cases() + expert_cases() if (case.in_quick or not arguments.quick) and word in case.name
    ]
    if arguments.list or not torch.cuda.is_available():
        _print_plan(cases, why="" if arguments.list else "no CUDA device here; on one this would run:")
        return 0
    results, ceilings = _run_all(cases)
    _report(results, ceilings, arguments.output)
    return 1 if any(result.is_wrong for result in results) else 0


def _print_plan(cases: list[Case], *, why: str) -> None:
    if why:
        print(why)
    for case in cases:
        flops = f", {case.num_flops / 1e9:10.1f} GFLOP {case.matmul}" if case.num_flops else ""
        print(f"{case.name:30} {case.size:60} {case.num_bytes / 1e6:10.2f} MB{flops}")
    print(f"{len(cases)} cases")


def _run_all(cases: list[Case]) -> tuple[list[Result], Ceilings]:
    begin, seed = time.monotonic(), int(time.time())
    torch.manual_seed(seed)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, seed {seed}")
    ceilings = measure_ceilings()
    print(f"copy {ceilings.copy / 1e12:.2f} TB/s, bf16 {ceilings.bf16 / 1e12:.0f} TFLOP/s, fp8 {ceilings.fp8 / 1e12:.0f} TFLOP/s")
    results = []
    for case in cases:
        result = _new_result(case, ceilings)
        if time.monotonic() - begin > DEADLINE_S:
            result.problem = f"not run: {DEADLINE_S:.0f} s were over"
        else:
            _measure(case, result)
        results.append(result)
        print(_line(result), flush=True)
    return results, ceilings


def measure_ceilings() -> Ceilings:
    copy_us, size = _copy_us(COPY_BYTES), PRODUCT_SIZE
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16_us = _time(lambda: a @ b.t(), captured=True)
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    fp8_us = _time(lambda: torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16), captured=True)
    flops = 2 * size**3
    return Ceilings(copy=2 * COPY_BYTES / copy_us * 1e6, bf16=flops / bf16_us * 1e6, fp8=flops / fp8_us * 1e6)


def _copy_us(num_bytes: int) -> float:
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return _time(lambda: target.copy_(source), captured=True)


def _new_result(case: Case, ceilings: Ceilings) -> Result:
    memory_us = case.num_bytes / ceilings.copy * 1e6
    compute_us = case.num_flops / getattr(ceilings, case.matmul) * 1e6
    bound = f"{case.matmul} operations" if compute_us > memory_us else "memory"
    return Result(name=case.name, size=case.size, floor_us=max(memory_us, compute_us), bound=bound)


def _measure(case: Case, result: Result) -> None:
    """Fills in the result. A failure of one case is its result, not the end of the run."""
    try:
        ready = case.make()
        result.error = ready.error()
        if not result.error <= case.tolerance:  # also where it isn't a number
            result.problem, result.is_wrong = f"wrong: relative error {result.error:.2g}, allowed {case.tolerance}", True
        elif ready.repeats and not _repeats(ready.ours):
            result.problem, result.is_wrong = "wrong: two runs differ", True
        else:
            _fill_times(case, ready, result)
    except (RuntimeError, ValueError, ImportError, AttributeError, torch.AcceleratorError) as error:
        result.problem, result.is_wrong = f"failed: {type(error).__name__}: {str(error)[:200]}", True
    torch.cuda.empty_cache()


def _fill_times(case: Case, ready: Ready, result: Result) -> None:
    result.time_us = _time(ready.ours, captured=case.captured)
    result.floor_share = result.floor_us / result.time_us
    if case.num_bytes < L2_BYTES:
        result.notes.append("L2")
    if case.target is not None:
        result.notes.append(f"target {case.target:.0%}: {'met' if result.floor_share >= case.target else 'missed'}")
    if case.target_us is not None:
        result.notes.append(f"target {case.target_us:g} us: {'met' if result.time_us <= case.target_us else 'missed'}")
    for name, peer in ready.peers.items():
        try:
            result.peers_us[name] = _time(peer, captured=False)
        except (RuntimeError, ValueError, TypeError) as error:
            result.notes.append(f"{name} refused: {str(error)[:80]}")


def _repeats(call: Call) -> bool:
    """Whether two runs give the same bits."""
    first, second = (_bits(call()) for _ in range(2))
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def _bits(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    tensors = result if isinstance(result, tuple) else (result,)
    return [x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for x in tensors]


def _time(call: Callable[[], object], *, captured: bool) -> float:
    """Median microseconds of one call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    run, calls = (_captured(call), CALLS_IN_GRAPH) if captured else (call, 1)
    spans = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end) * 1000 / calls)
    return statistics.median(spans)


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_GRAPH):
            call()
    graph.replay()
    return graph.replay


def _line(result: Result) -> str:
    if result.time_us is None or result.floor_share is None:
        return f"{result.name:30} {result.size:60} {result.problem}"
    peers = ", ".join(f"{name} {us:.1f} us ({us / result.time_us:.2f}x)" for name, us in result.peers_us.items())
    share = f"{result.time_us:9.1f} us  floor {result.floor_us:9.1f} ({result.bound})  {result.floor_share:6.1%}"
    return f"{result.name:30} {result.size:60} {share}  {peers}  {'; '.join(result.notes)}"


def _report(results: list[Result], ceilings: Ceilings, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version()}
    summary = {"machine": machine, "ceilings": asdict(ceilings), "results": [asdict(result) for result in results]}
    (folder / "report.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    rows = [
        f"| {r.name} | {r.size} | {_number(r.time_us)} | {r.floor_us:.1f} ({r.bound}) | "
        f"{'' if r.floor_share is None else f'{r.floor_share:.0%}'} | "
        f"{', '.join(f'{name} {us:.1f}' for name, us in r.peers_us.items())} | {r.problem or '; '.join(r.notes)} |"
        for r in results
    ]
    head = [
        f"# {machine['device']}, {time.strftime('%Y-%m-%d')}",
        "",
        f"torch {machine['torch']}; copy {ceilings.copy / 1e12:.2f} TB/s, bf16 {ceilings.bf16 / 1e12:.0f} TFLOP/s, "
        f"fp8 {ceilings.fp8 / 1e12:.0f} TFLOP/s, measured in this run.",
        "",
        "| kernel | size | us | floor, us | floor / time | peers, us | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    (folder / "report.md").write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    print(f"{folder / 'report.md'}, {folder / 'report.json'}")
    print(json.dumps({"ceilings": summary["ceilings"], "cases": len(results), "wrong": sum(r.is_wrong for r in results)}))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
