"""One GPU's exact share of a wide-EP cluster: `python benchmarks/rank_slice.py` runs what one rank of EP-N runs, at real sizes.

DeepSeek-V3 with dummy FP8 weights: 61 layers, full MLA (DP attention), the rank's part of the routed experts (9 slots at 288 / EP
32, 4 at 288 / EP 72), shared expert, dense layers, embedding and head. The experts receive the rows that such a rank would receive,
balanced or not (slice_traffic.py, slice_dispatcher.py), and where a rank would wait for the network, it waits for the time that
DeepEP's published tables say (slice_network.py). Every case runs without waits ("alone"), straight, and in two micro-batches.

Needs torch, numpy, safetensors and, on a GPU, triton; under 9 minutes. Prints what it measured beside the floors of the roofline
(slice_roofline.py) and the published figures, says what is assumed, and writes report.json and report.md. Without a GPU it says
what it would run, with an H200's floors, and exits 0; `--cpu-tiny` really runs reduced sizes on the CPU. Exit status 1: no case
could run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bare_import  # noqa: F401  before anything of moesaic
import torch
from h200 import measure_ceilings
from slice_cases import DEEPSEEK_V3, TINY, Case, all_cases, tiny_cases
from slice_report import ASSUMED, DERIVED, MEASURED, case_report, plan_line, result_line, write_report
from slice_roofline import H200, Machine
from slice_run import RankSlice, needed_bytes
from slice_wire import Wire, make_wire

from moesaic.kernels.grouped_backends import DENSE_NAMES, NAMES, Name
from moesaic.launch.models.config import ModelConfig

DEADLINE_S = 480.0
Backends = tuple[Name, Name]
"""Of the experts' products, and of all other FP8 products."""


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    config, cases = (TINY, tiny_cases()) if options.cpu_tiny else (DEEPSEEK_V3, all_cases())
    chosen = [case for case in cases if (case.in_quick or not options.quick) and options.only in case.name]
    if not chosen:
        parser.error(f"no case has {options.only!r} in its name; --list shows them all")
    if options.list or not (options.cpu_tiny or torch.cuda.is_available()):
        _print_plan(config, chosen, why="" if options.list else "no CUDA device here; on one this would run:")
        return 0
    device = torch.device("cpu" if options.cpu_tiny else "cuda")
    machine = replace(H200, name="CPU, reduced sizes (floors of a GPU)") if options.cpu_tiny else _measured_machine()
    backends: Backends = ("torch", "torch") if options.cpu_tiny else (options.moe_runner_backend, options.fp8_gemm_backend)
    title = f"One rank of a wide-EP cluster: {machine.name}, {time.strftime('%Y-%m-%d')}"
    reports: list[dict[str, Any]] = []
    for report in _run_all(config, chosen, machine, device, backends):
        reports.append(report)
        print(result_line(report), flush=True)
        write_report(options.output, machine, reports, title)  # a run that is cut off leaves what it has
    for words in (MEASURED, ASSUMED, DERIVED):
        print(" ".join(words.split()))
    print(f"{options.output / 'report.md'}, {options.output / 'report.json'}")
    ran = sum(report["problem"] is None for report in reports)
    print(json.dumps({"machine": machine.name, "cases": len(reports), "ran": ran}))
    return 0 if ran else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python benchmarks/rank_slice.py", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="say what would run, with an H200's floors")
    parser.add_argument("--only", metavar="WORDS", default="", help='only cases with these words in their name ("decode EP72")')
    parser.add_argument("--quick", action="store_true", help="one prefill and one decode setting")
    parser.add_argument("--cpu-tiny", action="store_true", help="reduced sizes on the CPU: shows that all of it runs")
    parser.add_argument(
        "--moe-runner-backend", choices=NAMES, default="triton", help="what computes the experts' products on a GPU (triton)"
    )
    parser.add_argument(
        "--fp8-gemm-backend", choices=DENSE_NAMES, default="triton", help="what computes the other FP8 products on a GPU (triton)"
    )
    parser.add_argument("--output", type=Path, default=Path("rank-slice-report"), help="folder of report.json and report.md")
    return parser


def _print_plan(config: ModelConfig, cases: list[Case], *, why: str) -> None:
    if why:
        print(why)
    for case in cases:
        print(plan_line(case_report(config, case, H200, None, None)))
    print(f"{len(cases)} cases, each without communication, straight, and in two micro-batches")
    print(f"floors of an {H200.name}: {H200.source}")
    print(" ".join(ASSUMED.split()))


def _measured_machine() -> Machine:
    """This GPU, by a copy and large matrix products."""
    ceilings = measure_ceilings()
    torch.cuda.empty_cache()
    return Machine(
        name=torch.cuda.get_device_name(),
        copy=ceilings.copy,
        rates={"fp8": ceilings.fp8, "bf16": ceilings.bf16, "fp32": H200.rates["fp32"]},
        source="copy, bf16 and FP8 products measured in this run; fp32 near the 67 TFLOP/s of the data sheet",
    )


def _run_all(
    config: ModelConfig, cases: list[Case], machine: Machine, device: torch.device, backends: Backends
) -> Iterator[dict[str, Any]]:
    """The report of each case, when it is there."""
    begun, wire = time.monotonic(), make_wire(device)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    runner: RankSlice | None = None
    layout: tuple[int, int] | None = None
    for case in cases:
        measured, problem = None, refusal(config, case, memory)
        if problem is None and time.monotonic() - begun > DEADLINE_S:
            problem = f"not run: {DEADLINE_S:.0f} s were over"
        if problem is None:
            try:
                if runner is None or layout != (case.ep_size, case.num_slots):
                    runner, layout = None, (case.ep_size, case.num_slots)  # the old weights go before the new ones come
                    runner = _new_slice(config, case, device, wire, backends)
                measured = runner.measure(case)
            except Exception as error:  # a compiler's, a library's, the device's: it is this case's result, not the end of the run
                problem = f"failed: {type(error).__name__}: {str(error)[:300]}"
        yield case_report(config, case, machine, measured, problem)


def refusal(config: ModelConfig, case: Case, memory_bytes: int | None) -> str | None:
    """Why a device of this memory (None: the CPU's, which is enough for the tiny model) can't run the case, or None."""
    needed = needed_bytes(config, case)
    if memory_bytes is None or sum(needed.values()) <= memory_bytes:
        return None
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in needed.items())
    return f"not run: it needs {sum(needed.values()) / 1e9:.1f} GB ({parts}), the device has {memory_bytes / 1e9:.1f} GB"


def _new_slice(config: ModelConfig, case: Case, device: torch.device, wire: Wire, backends: Backends) -> RankSlice:
    needed = needed_bytes(config, case, 4 if device.type == "cpu" else 2)
    place = case.place(config)
    slots = f"{place.num_local} of {case.num_slots} slots in each layer"
    print(f"EP{case.ep_size}: {slots}, {needed['weights']:,} bytes of weights", flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return RankSlice(config, case, device=device, dtype=dtype, wire=wire, runner=backends[0], fp8_gemm=backends[1])


if __name__ == "__main__":
    sys.exit(main())
