"""The process settings that make training on two cores fast, applied by starting the process again.

Memory: glibc hands large blocks back to the system and takes them again with fresh pages, so every activation of a step
would be page-faulted in anew. Keeping freed memory makes big allocations several times cheaper (the cross entropy of
one step, 248 ms, becomes 129 ms).

Threads: an OpenMP thread that waits for the others spins. Where another program has taken one of the cores, it spins on
the very core that the thread it waits for could use, and a step takes three times as long. A short spin avoids that.

Both are read once, before main(), so the process replaces itself.
"""

import os
import sys

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GOMP_SPINCOUNT": "2000",
}


def tune_process(module: str) -> None:
    """Restarts `python -m module` with the same arguments under SETTINGS, unless they are set already."""
    if all(name in os.environ for name in SETTINGS):
        return
    os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**SETTINGS, **os.environ})
