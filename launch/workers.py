"""One process per rank of this node: started, watched, stopped, and none left behind.

Knows processes, not what they compute. Plain child processes rather than `multiprocessing`: each gets its own
environment (thread counts and malloc settings must be there before Python starts) and its own process group (a
terminal's Ctrl-C must reach the launcher alone), and neither `__main__` is imported again nor a resource tracker
started. The group must be started by a thread that lives as long as the ranks should: on Linux they die with it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesaic.launch.engine.rank_spec import RankSpec

ENTRY = "moesaic.launch.rank_entry:run"
POLL_SECONDS = 0.05
TERMINATE_SECONDS = 2.0
# Above any tensor: glibc otherwise maps and unmaps big CPU tensors on each allocation, and every page faults anew.
MALLOC_BYTES = str(1 << 32)


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """A rank process that ended. `returncode` is negative for a signal, as in subprocess."""

    rank: int
    pid: int
    returncode: int

    @property
    def killed(self) -> bool:
        return self.returncode < 0

    def __str__(self) -> str:
        if self.killed:
            with contextlib.suppress(ValueError):
                return f"rank {self.rank} (pid {self.pid}) was killed by {signal.Signals(-self.returncode).name}"
        return f"rank {self.rank} (pid {self.pid}) exited with code {self.returncode}"


def rank_environment(num_threads: int, dist_init_method: str) -> dict[str, str]:
    """What a rank needs in its environment before Python starts."""
    threads = str(num_threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "MALLOC_MMAP_THRESHOLD_": MALLOC_BYTES,
        "MALLOC_TRIM_THRESHOLD_": MALLOC_BYTES,
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if sys.platform == "linux" and dist_init_method.startswith(("file://", "tcp://127.", "tcp://localhost:")):
        # gloo otherwise looks up the machine's own name, which many laptops cannot resolve.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


class WorkerGroup:
    """The rank processes of one node. `entry` is `module:function`, called with its RankSpec in each process."""

    def __init__(self, specs: Sequence[RankSpec], *, entry: str = ENTRY, environment: Mapping[str, str] | None = None) -> None:
        self._specs = specs
        self._entry = entry
        self._environment = environment or {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all ranks. On any error the ones already started are stopped again."""
        try:
            for spec in self._specs:
                self._processes[spec.place.rank] = self._spawn(spec)
        except BaseException:
            self.stop(grace_seconds=0)
            raise

    def _spawn(self, spec: RankSpec) -> subprocess.Popen[bytes]:
        label = f"dp{spec.place.dp_rank}-rank{spec.place.rank}"
        command = [sys.executable, "-m", "moesaic.launch.rank_main", self._entry, label, str(os.getpid())]
        environment = rank_environment(spec.config.num_threads, spec.dist_init_method) | dict(self._environment)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, process_group=0)
        assert process.stdin is not None
        # A rank that dies at once closes the pipe; `exits` will name it.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(pickle.dumps(spec))
            process.stdin.flush()
        return process

    @property
    def pids(self) -> dict[int, int]:
        """Process id by rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def exits(self) -> list[RankExit]:
        """The ranks that have ended, killed ones first: they are the cause, the others gave up on them."""
        ended = [
            RankExit(rank=rank, pid=process.pid, returncode=code)
            for rank, process in self._processes.items()
            if (code := process.poll()) is not None
        ]
        return sorted(ended, key=lambda one: (not one.killed, one.rank))

    def stop(self, grace_seconds: float) -> None:
        """End all ranks: wait for them to end by themselves, then SIGTERM, then SIGKILL. Returns when none is left."""
        self._wait(grace_seconds)
        if self._signal(signal.SIGTERM):
            self._wait(TERMINATE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """SIGKILL everything, the ranks' own children included, and wait for it."""
        for process in self._processes.values():
            # The group outlives its leader when a rank has started helpers of its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()

    def _alive(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._processes.values() if process.poll() is None]

    def _signal(self, number: signal.Signals) -> bool:
        alive = self._alive()
        for process in alive:
            process.send_signal(number)
        return bool(alive)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._alive() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
