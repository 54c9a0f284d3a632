"""When ranks count as dead or stuck."""

from __future__ import annotations

from moesaic.launch.engine.messages import Heartbeat
from moesaic.launch.http.health import HealthMonitor


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def monitor() -> tuple[HealthMonitor, Clock]:
    clock = Clock()
    return HealthMonitor(2, heartbeat_deadline=5, watchdog_timeout=300, clock=clock), clock


def beat(monitor: HealthMonitor, rank: int, operation: str = "idle", seconds: float = 0.0) -> None:
    monitor.observe(Heartbeat(rank=rank, step=7, operation=operation, seconds=seconds))


def test_silence_is_red_and_names_rank_and_last_operation() -> None:
    health, clock = monitor()
    beat(health, 0)
    beat(health, 1, "forward")
    clock.now += 4
    beat(health, 0)
    assert health.problem() is None
    clock.now += 2
    assert health.problem() == "rank 1 has sent no heartbeat for 6.0 s; its last operation was 'forward'"
    beat(health, 1, "forward")
    assert health.problem() is None


def test_a_rank_that_never_spoke_is_red_too() -> None:
    health, clock = monitor()
    clock.now += 6
    beat(health, 0)
    problem = health.problem()
    assert problem is not None
    assert problem.startswith("rank 1")
    health.restart()
    assert health.problem() is None


def test_one_operation_for_too_long_is_red_unless_it_is_waiting() -> None:
    health, _clock = monitor()
    beat(health, 0, "idle", 10_000)
    beat(health, 1, "wait", 10_000)
    assert health.problem() is None
    beat(health, 1, "all_to_all", 299)
    assert health.problem() is None
    beat(health, 1, "all_to_all", 301)
    assert health.problem() == "rank 1 has been in operation 'all_to_all' for 301 s (step 7)"
