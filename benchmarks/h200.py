"""Every device kernel against its physical floor and its best importable peer: `python benchmarks/h200.py` on a Hopper GPU.

Needs torch, triton and numpy only, under 9 minutes. Copy bandwidth and matrix ceilings are measured first, in the same run; a
case's floor is the larger of its bytes over the one and its operations over the other. Results are checked against a reference,
and a second run against the first bit by bit, before anything is timed (h200_timing.py says how). The report is written after every
case; one that fails is noted and the rest go on, in a new process where it took the GPU's context with it or hung. `--continue`
goes on where a run was cut off. Without a GPU it says what it would run and exits 0. Exit status 1: a result was wrong.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import bare_import  # noqa: F401  before anything of moesaic
import torch
from h200_attention_cases import attention_cases
from h200_cases import Call, Case, Ready
from h200_dense_cases import dense_cases
from h200_expert_cases import expert_cases
from h200_product_cases import product_cases
from h200_report import Report, Result
from h200_row_cases import row_cases
from h200_step_cases import step_cases
from h200_timing import Ceilings, cold_us, measure_ceilings, warm_us
from torch import Tensor

SECONDS, CASE_SECONDS = 500.0, 120.0
L2_BYTES = 50 * 2**20
UNENDED = "did not end: it hung, or the run was cut off here"


def main() -> int:
    arguments = _parser().parse_args()
    word = arguments.only or ""
    cases = [case for case in all_cases() if (case.in_quick or not arguments.quick) and word in case.name]
    if arguments.list or not torch.cuda.is_available():
        _print_plan(cases, why="" if arguments.list else "no CUDA device here; on one this would run:")
        return 0
    report = Report.read(arguments.output) if arguments.go_on else None
    report = report or _new_report(arguments.output)
    _run(cases, report, deadline=time.monotonic() + arguments.seconds)
    print(f"{report.folder / 'report.md'}, {report.folder / 'report.json'}")
    print(report.summary())
    return 1 if any(result.is_wrong for result in report.results) else 0


def _run(cases: list[Case], report: Report, *, deadline: float) -> None:
    """All cases, in as many processes as it takes; `report` has been written, and says of a case that began that it did not end."""

    def restart() -> None:
        rest = ["--continue", "--seconds", str(max(deadline - time.monotonic(), 0.0))]
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *rest])

    def measure_in_time(case: Case, result: Result) -> None:
        watch = threading.Timer(CASE_SECONDS, restart)
        watch.daemon = True
        watch.start()
        measure(case, result)
        watch.cancel()

    run_cases(cases, report, measure_in_time, lambda: time.monotonic() < deadline)
    if _context_is_dead():
        restart()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python benchmarks/h200.py", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--only", metavar="WORD", help="only cases with this word in their name")
    parser.add_argument("--quick", action="store_true", help="one size of every kernel")
    parser.add_argument("--output", type=Path, default=Path("h200-report"), help="folder of report.json and report.md")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="go on with the report in --output")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"begin no case after so many [{SECONDS:.0f}]")
    return parser


def all_cases() -> list[Case]:
    """One size of every kernel first: what a run that is cut off should have."""
    cases = row_cases() + attention_cases() + product_cases() + expert_cases() + dense_cases() + step_cases()
    return sorted(cases, key=lambda case: not case.in_quick)


def _print_plan(cases: list[Case], *, why: str) -> None:
    if why:
        print(why)
    for case in cases:
        flops = f", {case.num_flops / 1e9:10.1f} GFLOP {case.matmul}" if case.num_flops else ""
        print(f"{case.name:30} {case.size:60} {case.num_bytes / 1e6:10.2f} MB{flops}")
    print(f"{len(cases)} cases")


def _new_report(folder: Path) -> Report:
    seed = int(time.time())
    torch.manual_seed(seed)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version()}
    print(f"{machine['device']}, torch {torch.__version__}, seed {seed}")
    found = measure_ceilings()
    print(found)
    return Report(folder=folder, machine=machine, ceilings=found)


def run_cases(
    cases: list[Case], report: Report, measure_one: Callable[[Case, Result], None], is_time_left: Callable[[], bool]
) -> None:
    """Adds a result for each case that the report does not have yet; ends early where a case has broken the device."""
    known = {(result.name, result.size) for result in report.results if result.problem is None or result.is_wrong}
    report.results = [result for result in report.results if (result.name, result.size) in known]
    for case in cases:
        if (case.name, case.size) in known:
            continue
        result = new_result(case, report.ceilings)
        report.results.append(result)
        if is_time_left():
            result.problem, result.is_wrong = UNENDED, True
            report.write()
            measure_one(case, result)
        else:
            result.problem = "not run: the time was over"
        report.write()
        print(result.line, flush=True)
        if _context_is_dead():
            return


def _context_is_dead() -> bool:
    """After an illegal access every call on the device fails, until the process ends."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def new_result(case: Case, ceilings: Ceilings) -> Result:
    memory_us = case.num_bytes / ceilings.copy * 1e6
    compute_us = case.num_flops / getattr(ceilings, case.matmul) * 1e6
    bound = f"{case.matmul} operations" if compute_us > memory_us else "memory"
    return Result(name=case.name, size=case.size, floor_us=max(memory_us, compute_us), bound=bound)


def measure(case: Case, result: Result) -> None:
    """Fills in the result, whatever happens."""
    try:
        _check_and_time(case, result)
    except Exception as error:  # a compiler's, a library's, the device's: it is this case's result, not the end of the run
        result.problem, result.is_wrong = f"failed: {type(error).__name__}: {str(error)[:200]}", True
    gc.collect()
    if torch.cuda.is_available() and not _context_is_dead():
        torch.cuda.empty_cache()


def _check_and_time(case: Case, result: Result) -> None:
    ready = case.make()
    result.error, result.problem, result.is_wrong = ready.error(), None, False
    if not result.error <= case.tolerance:  # also where it isn't a number
        result.problem, result.is_wrong = f"wrong: relative error {result.error:.2g}, allowed {case.tolerance}", True
    elif ready.repeats and not repeats(ready.specified or ready.ours):
        result.problem, result.is_wrong = "wrong: two runs differ", True
    else:
        _fill_times(case, ready, result)


def _fill_times(case: Case, ready: Ready, result: Result) -> None:
    result.time_us = warm_us(ready.ours, captured=case.captured)
    if case.captured and case.num_bytes < 2 * L2_BYTES:
        result.cold_us = cold_us(ready.ours)
    result.floor_share = result.floor_us / max(result.time_us, result.cold_us or 0.0)
    if case.target is not None:
        result.notes.append(f"target {case.target:.0%}: {'met' if result.floor_share >= case.target else 'missed'}")
    if case.target_us is not None:
        result.notes.append(f"target {case.target_us:g} us: {'met' if result.time_us <= case.target_us else 'missed'}")
    for name, peer in ready.peers.items():
        try:
            result.peers_us[name] = warm_us(peer, captured=False)
        except Exception as error:  # whatever another library raises
            result.notes.append(f"{name} refused: {type(error).__name__}: {str(error)[:80]}")


def repeats(call: Call) -> bool:
    """Whether two runs give the same bits."""
    first = _bits(call())
    second = _bits(call())
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def _bits(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    tensors = result if isinstance(result, tuple) else (result,)
    return [x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for x in tensors]


if __name__ == "__main__":
    sys.exit(main())
