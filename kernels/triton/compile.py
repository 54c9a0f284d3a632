"""`python -m moesaic.kernels.triton.compile`: compiles all Triton kernels for Hopper (sm_90a), without a GPU, and weighs them.

resources.json beside this file holds the last known registers, spills and shared memory; `--write` renews it, with `--only WORD`
for the kernels with this word in their name. Triton keeps compiled kernels in its own cache by the hash of their source, so only
what changed is compiled again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from moesaic.kernels.triton.catalogue import catalogue
from moesaic.kernels.triton.launch import Launch

TABLE = Path(__file__).with_name("resources.json")
HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP_DEADLINE_S = 60


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one program of a kernel needs. Registers are per thread; spilled bytes, too (its stack and local memory).

    Of Hopper's own instructions: how often the code has tensor-core products (wgmma) and tensor copies (TMA).
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    wgmma: int
    tma: int


def resources_of(launch: Launch) -> Resources:
    """Compile the launch as Triton's own launcher would on an H100 or H200. Raises what Triton raises."""
    backend = make_backend(HOPPER)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=HOPPER, options=parsed.__dict__)
    registers, spilled = usage(compiled.asm["cubin"])
    code: str = compiled.asm["ptx"]
    return Resources(
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        wgmma=code.count("wgmma.mma_async"),
        tma=code.count("cp.async.bulk.tensor"),
    )


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of the one kernel in a binary, as the driver would read them."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=CUOBJDUMP_DEADLINE_S, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump doesn't say what the kernel uses: {done.stdout[:300]!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def measure(only: str = "") -> dict[str, dict[str, int]]:
    """Resources of every kernel of the catalogue with `only` in its name, by name."""
    return {name: asdict(resources_of(launch)) for name, launch in catalogue().items() if only in name}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moesaic.kernels.triton.compile", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"renew {TABLE.name}")
    parser.add_argument("--only", metavar="WORD", default="", help="only kernels with this word in their name")
    arguments = parser.parse_args()
    measured = measure(arguments.only)
    for name, needs in measured.items():
        print(f"{name:40}" + "".join(f"  {needs[key]:>6} {key}" for key in needs))
    return settle(measured, TABLE, only=arguments.only, write=arguments.write)


def settle(measured: dict[str, dict[str, int]], table: Path, *, only: str, write: bool) -> int:
    """Compares with what the table knows of the kernels with `only` in their names, or renews it there. Returns the exit status."""
    known: dict[str, dict[str, int]] = json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}
    others = {name: needs for name, needs in known.items() if only not in name}
    if write:
        table.write_text(json.dumps(others | measured, indent=1) + "\n", encoding="utf-8")
        return 0
    names = sorted((measured.keys() | known.keys()) - others.keys())
    changed = [name for name in names if measured.get(name) != known.get(name)]
    for name in changed:
        print(f"{name}: known {known.get(name)}, now {measured.get(name)}", file=sys.stderr)
    if changed:
        print("after a look, renew the table with --write", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
