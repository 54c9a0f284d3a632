"""benchmarks/bench_scheduler.py stands in for the model runner, and so breaks when what the engine asks of one changes."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def test_the_engine_steps_over_prepared_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_scheduler

    monkeypatch.setattr(bench_scheduler, "STEPS", 3)
    assert bench_scheduler.step_ms(2) > 0
