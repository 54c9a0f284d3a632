"""benchmarks/h200.py without a GPU: it says what it would run, and its cases are sound (checked at toy sizes on the CPU)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
def step_cases(cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import h200_step_cases

    for name, value in {"VOCABULARY": 300, "NOPE": 16, "VALUE": 8, "PROMPT": 16, "REDUNDANT": 4}.items():
        monkeypatch.setattr(h200_step_cases, name, value)
    return h200_step_cases


@pytest.fixture
def expert_cases(cases: ModuleType) -> ModuleType:
    import h200_expert_cases

    return h200_expert_cases


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


def test_every_kernel_has_a_quick_case_and_bytes_to_move(
    cases: ModuleType, step_cases: ModuleType, expert_cases: ModuleType
) -> None:
    found = cases.all_cases() + step_cases.step_cases() + expert_cases.expert_cases()
    assert {case.name for case in found if case.in_quick} == {case.name for case in found}
    assert all(case.num_bytes > 0 for case in found)
    assert len({(case.name, case.size) for case in found}) == len(found)


def test_each_case_agrees_with_its_reference_and_its_peers_run(
    cases: ModuleType, step_cases: ModuleType, expert_cases: ModuleType
) -> None:
    small = [
        *cases._row_cases(8),
        *cases._decode_expert_cases(4, 32)[:2],
        cases._mla(3, 16, False),
        cases._mla(3, 16, True),
        step_cases._balanced(4, 4),
        step_cases._prefill(32),
        step_cases._merge(4),
        step_cases._embed(4),
        *step_cases._sampling(4),
        step_cases._peers(3),
        expert_cases._experts(1, 3, masked=True),
        expert_cases._experts(1, 3, masked=False),
    ]
    for case in small:
        ready = case.make()
        assert ready.error() <= case.tolerance, case.name
        ready.ours()
        for peer in ready.peers.values():
            peer()


def test_a_wrong_result_and_a_nan_are_seen(cases: ModuleType) -> None:
    exact = torch.ones(4)
    assert cases.relative_error(exact, exact) == 0
    assert cases.relative_error(exact * 1.1, exact) > 0.05
    assert not cases.relative_error(exact * float("nan"), exact) <= 1
