"""benchmarks/h200.py without a GPU: it says what it would run, and its cases are sound (checked at toy sizes on the CPU)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import interpreter  # noqa: F401  before anything that imports Triton
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOY = {"HIDDEN": 256, "INTERMEDIATE": 128, "EXPERTS": 32, "HEADS": 3, "LATENT": 128, "KEY": 16, "PAGE": 4, "DEVICE": "cpu"}


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import h200_cases

    for name, value in TOY.items():
        monkeypatch.setattr(h200_cases, name, value)
    return h200_cases


@pytest.fixture
def benchmark(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """h200.py, with all cases at toy sizes."""
    import h200
    import h200_attention_cases
    import h200_step_cases

    monkeypatch.setattr(h200_attention_cases, "PROMPT", 16)
    monkeypatch.setattr(h200_step_cases, "REDUNDANT", 4)
    return h200


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_what_it_would_run(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "h200.py"), "--quick", "--only", "mla_decode"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device here" in done.stdout
    assert "128 x 4096" in done.stdout
    assert "2 cases" in done.stdout


def test_moesaic_is_found_in_the_repository_where_it_is_not_installed() -> None:
    """-S: no site-packages, so no editable install; the module that is found needs nothing but the standard library."""
    code = "import bare_import, moesaic; from importlib.util import find_spec; print(find_spec('moesaic.kernels.quant').origin)"
    command = [sys.executable, "-S", "-c", code]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=BENCHMARKS, env=bare)
    assert done.stdout.strip() == str(BENCHMARKS.parent / "kernels" / "quant.py"), done.stderr


def test_every_kernel_has_a_quick_case_and_bytes_to_move(benchmark: ModuleType) -> None:
    found = benchmark.all_cases()
    assert {case.name for case in found if case.in_quick} == {case.name for case in found}
    assert all(case.num_bytes > 0 for case in found)
    assert len({(case.name, case.size) for case in found}) == len(found)


def test_each_case_agrees_with_its_reference_and_its_peers_run(benchmark: ModuleType) -> None:
    import h200_attention_cases as attention
    import h200_dense_cases as dense
    import h200_expert_cases as experts
    import h200_product_cases as products
    import h200_row_cases as rows
    import h200_step_cases as steps

    small = [
        *rows._row_cases(8),
        *products._decode_expert_cases(4, 32)[:2],
        attention._mla(3, 16, False),
        attention._mla(3, 16, True),
        attention._prefill(32),
        attention._merge(4),
        steps._balanced(4, 4),
        steps._embed(4),
        *steps._sampling(4),
        steps._peers(3),
        experts._experts(1, 3, masked=True),
        experts._experts(1, 3, masked=False),
        dense._product(3, "a product", 72, 144),
    ]
    for case in small:
        ready = case.make()
        assert ready.error() <= case.tolerance, case.name
        if ready.repeats:
            assert benchmark.repeats(ready.specified or ready.ours), case.name
        for peer in ready.peers.values():
            peer()


def test_a_failing_case_is_noted_and_the_rest_go_on_and_a_cut_off_run_is_continued(benchmark: ModuleType, tmp_path: Path) -> None:
    """Without a GPU the first, which nothing is wrong with, can't be timed."""
    import h200_report
    import h200_row_cases as rows
    from h200_timing import Ceilings

    small = rows._row_cases(4)[:4]
    ceilings = Ceilings(copy=4e12, bf16=8e14, fp8=16e14)
    report = h200_report.Report(folder=tmp_path, machine={"device": "d", "torch": "t"}, ceilings=ceilings)
    asked: list[str] = []

    def measure(case: Any, result: Any) -> None:
        seen = h200_report.Report.read(tmp_path)
        assert seen.results[-1].problem == benchmark.UNENDED
        asked.append(case.name)
        if len(asked) == 2:
            case = replace(case, make=lambda: {}["no such kernel"])
        if len(asked) == 3:
            raise KeyboardInterrupt
        benchmark.measure(case, result)

    with pytest.raises(KeyboardInterrupt):
        benchmark.run_cases(small, report, measure, lambda: True)
    report = h200_report.Report.read(tmp_path)
    assert [result.is_wrong for result in report.results[1:]] == [True, True]
    assert report.results[1].problem == "failed: KeyError: 'no such kernel'"
    benchmark.run_cases(small, report, measure, lambda: False)
    benchmark.run_cases(small, report, measure, lambda: True)
    assert asked == [case.name for case in small]
    assert "did not end" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_wrong_result_and_a_nan_are_seen(cases: ModuleType) -> None:
    exact = torch.ones(4)
    assert cases.relative_error(exact, exact) == 0
    assert cases.relative_error(exact * 1.1, exact) > 0.05
    assert not cases.relative_error(exact * float("nan"), exact) <= 1
