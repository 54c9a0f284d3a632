"""Compiles the CPU kernels once per machine with the system's C compiler and keeps the result in a cache folder.

They need a C compiler with OpenMP; without one the torch references compute the same, only slower. The sources lie beside this
file; one shared object holds them all. Imports nothing of torch, so that a launcher may ask before its ranks start.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
CACHE_VARIABLE = "MOESAIC_CACHE_DIR"
"""Folder of the compiled kernels; ~/.cache/moesaic when it is not set."""
SWITCH_VARIABLE = "MOESAIC_CPU_KERNELS"
""""torch" keeps to the torch references."""
COMPILE_DEADLINE_S = 120


class CompilerError(RuntimeError):
    """No compiler, or one that refused the sources, or none is wanted."""


def why_missing() -> str | None:
    """Why this machine can't have the compiled kernels; None if it can (they are compiled now if they weren't)."""
    try:
        shared_object()
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return str(error)
    return None


def shared_object() -> Path:
    """The shared object for these sources, this compiler and this processor; made when it isn't in the cache yet.

    Raises CompilerError, OSError (the cache folder), RuntimeError (no home folder) or SubprocessError (a compiler that hangs).
    """
    if os.environ.get(SWITCH_VARIABLE) == "torch":
        raise CompilerError(f"{SWITCH_VARIABLE}=torch")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CompilerError("no C compiler (cc, gcc or clang) on the PATH; install one, e.g. `apt-get install gcc`")
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.c"))
    digest = hashlib.sha256(" ".join((compiler, *FLAGS, _processor())).encode())
    for path in (*sources, *sorted(folder.glob("*.h"))):
        digest.update(path.read_bytes())
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "moesaic")
    target = cache / f"kernels-{digest.hexdigest()[:20]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _compile(compiler, sources, target)
    return target


def _compile(compiler: str, sources: list[Path], target: Path) -> None:
    """Into a name of its own first, so that processes that compile at once don't see each other's halves."""
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", name, *map(str, sources), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_DEADLINE_S, check=False)
        if done.returncode:
            raise CompilerError(f"{compiler} refused the CPU kernels: {done.stderr.strip()[:500]}")
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def _processor() -> str:
    """What -march=native depends on: caches in a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(dict.fromkeys(line for line in lines if line.startswith(("flags", "Features", "model name"))))
