"""The CuTe DSL kernels compile for Hopper without a GPU, on tensor cores and TMA, spill nothing, and need what the table says."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[2] / "kernels" / "cute" / "resources.json"


@pytest.mark.skipif(find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed (pip install nvidia-cutlass-dsl)")
def test_every_kernel_compiles_for_hopper_and_needs_what_the_table_says(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moesaic.kernels.cute.compile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "it leaves files behind"


@pytest.mark.parametrize(("name", "needs"), json.loads(TABLE.read_text(encoding="utf-8")).items())
def test_no_kernel_spills_and_each_uses_hoppers_own_instructions(name: str, needs: dict[str, int]) -> None:
    assert needs["spilled_bytes"] == 0
    assert needs["for_sm_90a"] == 1
    assert needs["wgmma"] > 0
    assert needs["tma"] > 0
