"""The first thing a rank process runs: it ties its life to the launcher's, reads its `RankSpec`, and calls the engine.

Run as `python -m moesaic.launch.rank_main MODULE:FUNCTION LABEL`; the label is for people who read `ps`. The pickled
spec comes over stdin, which then stays open as a lifeline: it ends when the launcher does, however that happens. On
Linux the kernel kills the rank as well, which also works while the rank is stuck in native code. Knows nothing of
engines.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
ORPHANED = 3


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the launcher's main thread ends; end at once if it ended before we asked."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(ORPHANED)


def _watch_lifeline(lifeline: int) -> None:
    # Not through `sys.stdin`: a thread that waits inside a Python file object makes the interpreter abort at its end.
    with contextlib.suppress(OSError):
        os.read(lifeline, 1)
    os._exit(ORPHANED)


def main(argv: list[str]) -> None:
    """argv: entry as `module:function`, label, the launcher's pid."""
    entry, _label, parent_pid = argv
    die_with_parent(int(parent_pid))
    # Ctrl-C reaches the launcher, which then stops the ranks in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_watch_lifeline, args=(sys.stdin.fileno(),), name="lifeline", daemon=True).start()
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(spec)


if __name__ == "__main__":
    main(sys.argv[1:])
