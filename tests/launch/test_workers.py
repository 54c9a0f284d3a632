"""Rank processes: started with their environment, named when they die, and never left behind."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moesaic.launch.engine.rank_spec import RankSpec
from moesaic.launch.supervision import Supervisor
from moesaic.launch.workers import WorkerGroup

MakeGroup = Callable[..., WorkerGroup]

# A launcher that starts two ranks, says their process ids, and waits to be killed.
LAUNCHER = """
import pickle, sys, time
from moesaic.launch.workers import WorkerGroup
specs, environment = pickle.load(sys.stdin.buffer)
group = WorkerGroup(specs, entry="standin_rank:stubborn", environment=environment)
group.start()
print(*group.pids.values(), flush=True)
time.sleep(120)
"""


@pytest.fixture
def make_group(make_specs: Callable[[int], list[RankSpec]], standin_environment: dict[str, str]) -> Iterator[MakeGroup]:
    groups: list[WorkerGroup] = []

    def make(function: str, num_ranks: int = 2) -> WorkerGroup:
        specs = make_specs(num_ranks)
        group = WorkerGroup(specs, entry=f"standin_rank:{function}", environment=standin_environment)
        groups.append(group)
        group.start()
        return group

    yield make
    for group in groups:
        group.kill()


def test_a_rank_that_exits_is_named_with_its_code_within_a_second(make_group: MakeGroup, wait_until: Callable[..., None]) -> None:
    group = make_group("rank_one_exits")

    wait_until(group.exits)

    assert [str(one) for one in group.exits()] == [f"rank 1 (pid {group.pids[1]}) exited with code 7"]


def test_a_killed_rank_is_noticed_at_once(make_group: MakeGroup, wait_until: Callable[..., None]) -> None:
    group = make_group("sleep")
    supervisor = Supervisor(group, watch=None)
    assert supervisor.culprit() is None

    os.kill(group.pids[1], signal.SIGKILL)
    killed_at = time.monotonic()
    wait_until(supervisor.culprit)

    assert time.monotonic() - killed_at < 1
    assert supervisor.culprit() == f"rank 1 (pid {group.pids[1]}) was killed by SIGKILL"


def test_the_killed_rank_is_blamed_and_not_the_one_that_gave_up_on_it(
    make_group: MakeGroup, wait_until: Callable[..., None]
) -> None:
    group = make_group("rank_one_is_killed_and_rank_zero_gives_up")
    supervisor = Supervisor(group, watch=None)

    wait_until(supervisor.culprit)

    assert str(supervisor.culprit()).startswith("rank 1 ")


def test_a_rank_that_cannot_even_start_is_named(
    make_specs: Callable[[int], list[RankSpec]], wait_until: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    group = WorkerGroup(make_specs(1), entry="no_such_module:run")
    group.start()

    wait_until(group.exits)

    assert "exited with code 1" in str(group.exits()[0])
    assert "no_such_module" in capfd.readouterr().err
    group.kill()


def test_stop_ends_all_ranks_even_those_that_ignore_it(
    make_group: MakeGroup, standin_environment: dict[str, str], wait_until: Callable[..., None]
) -> None:
    group = make_group("stubborn")
    wait_until(Path(standin_environment["STANDIN_NOTE"]).exists)
    pids = group.pids.values()

    group.stop(grace_seconds=0)

    assert not any(_alive(pid) for pid in pids)


def test_processes_that_a_rank_started_end_with_it(
    make_group: MakeGroup, standin_environment: dict[str, str], wait_until: Callable[..., None]
) -> None:
    group = make_group("with_a_child", num_ranks=1)
    note = Path(standin_environment["STANDIN_NOTE"])
    wait_until(lambda: group.exits() and note.exists())
    grandchild = int(note.read_text())
    assert _alive(grandchild)

    group.stop(grace_seconds=0)

    wait_until(lambda: not _alive(grandchild))


def test_ranks_start_with_their_environment(
    make_group: MakeGroup, standin_environment: dict[str, str], wait_until: Callable[..., None]
) -> None:
    group = make_group("report_environment", num_ranks=1)
    wait_until(group.exits)

    assert Path(standin_environment["STANDIN_NOTE"]).read_text().splitlines() == [
        "OMP_NUM_THREADS=1",
        "MALLOC_MMAP_THRESHOLD_=4294967296",
        "MALLOC_TRIM_THRESHOLD_=4294967296",
        "PYTHONSAFEPATH=1",
    ]


def test_no_rank_outlives_a_launcher_that_is_killed(
    make_specs: Callable[[int], list[RankSpec]], standin_environment: dict[str, str], wait_until: Callable[..., None]
) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False)
    with launcher:
        assert launcher.stdin is not None and launcher.stdout is not None
        launcher.stdin.write(pickle.dumps((make_specs(2), standin_environment)))
        launcher.stdin.close()
        pids = [int(word) for word in launcher.stdout.readline().split()]
        # One is past its start-up, the other may be in the middle of it: neither may survive.
        wait_until(Path(standin_environment["STANDIN_NOTE"]).exists)
        assert len(pids) == 2 and all(_alive(pid) for pid in pids)

        launcher.kill()

        wait_until(lambda: not any(_alive(pid) for pid in pids), seconds=5)


def _alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has collected does not."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
