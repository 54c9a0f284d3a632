"""`python -m moesaic.kernels.cute.compile`: compiles the CuTe DSL kernels for Hopper (sm_90a), without a GPU, and weighs them.

As kernels/triton/compile.py, with a resources.json of its own beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

# Both are read when cutlass is imported: without the first another chip is compiled for, without the second files lie about.
os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
KEPT = tempfile.TemporaryDirectory()
os.environ["CUTE_DSL_DUMP_DIR"] = KEPT.name

from moesaic.kernels.cute.grouped_gemm import compile_contiguous, compile_masked
from moesaic.kernels.triton.compile import settle, usage

TABLE = Path(__file__).with_name("resources.json")
LOCAL_EXPERTS, ROOM, WIDTH, DEPTH = 9, 1024, 4096, 7168


def measure() -> dict[str, dict[str, int]]:
    """Resources by name, at the gate and up product of DeepSeek-V3's routed experts. Registers are those at launch."""
    found, options = {}, "--keep-ptx --keep-cubin"
    kernels = {
        "grouped_gemm_masked": partial(compile_masked, LOCAL_EXPERTS, ROOM, WIDTH, DEPTH, scaled=False, options=options),
        "grouped_gemm_fp8_masked": partial(compile_masked, LOCAL_EXPERTS, ROOM, WIDTH, DEPTH, scaled=True, options=options),
        "grouped_gemm_contiguous": partial(compile_contiguous, LOCAL_EXPERTS, WIDTH, DEPTH, scaled=False, options=options),
        "grouped_gemm_fp8_contiguous": partial(compile_contiguous, LOCAL_EXPERTS, WIDTH, DEPTH, scaled=True, options=options),
    }
    for name, compile_one in kernels.items():
        compiled = compile_one()
        code: str = compiled.__ptx__
        registers, spilled = usage(compiled.__cubin__)
        found[name] = {
            "registers": registers,
            "spilled_bytes": spilled,
            "for_sm_90a": int(".target sm_90a" in code),
            "wgmma": code.count("wgmma.mma_async"),
            "tma": code.count("cp.async.bulk.tensor"),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moesaic.kernels.cute.compile", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"renew {TABLE.name}")
    measured = measure()
    for name, needs in measured.items():
        print(f"{name:40}" + "".join(f"  {needs[key]:>6} {key}" for key in needs))
    return settle(measured, TABLE, only="", write=parser.parse_args().write)


if __name__ == "__main__":
    sys.exit(main())
