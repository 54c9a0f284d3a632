"""The CuTe DSL kernels compile for Hopper without a GPU, on tensor cores and TMA, spill nothing, and need what the table says."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[2] / "kernels" / "cute" / "resources.json"


SCRIPT = """
import sys

from moesaic.kernels.cute.compile import main
import torch
from cutlass import cute
from moesaic.kernels.cute.grouped_gemm import as_cute, contiguous_forms
from moesaic.kernels.quant import FP8, empty_scales

@cute.jit
def show(x):
    print(x.type)

x = torch.zeros(384, 256)
for scaled, dtype in ((True, FP8), (False, torch.bfloat16)):
    scales = as_cute(empty_scales(x, mn_major=True).zero_(), alignment=4, rows_fastest=True)
    tensors = (as_cute(x.to(dtype)), as_cute(torch.zeros(384, 512, dtype=torch.bfloat16)), scales)
    for told, given in zip(contiguous_forms(512, 256, scaled=scaled), tensors):
        cute.compile(show, told)
        cute.compile(show, given)
sys.exit(main())
"""
"""Both claims in one process: to import torch and the compiler takes longer than to compile a kernel."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """What the script said, run in an empty folder."""
    if find_spec("cutlass") is None:
        pytest.skip("nvidia-cutlass-dsl is not installed (pip install nvidia-cutlass-dsl)")
    script = tmp_path_factory.mktemp("script") / "forms_and_table.py"  # the DSL reads a function's source from its file
    script.write_text(SCRIPT, encoding="utf-8")
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=250, check=False, cwd=folder)
    assert not list(folder.iterdir()), "it leaves files behind"
    return done


def test_every_kernel_compiles_for_hopper_and_needs_what_the_table_says(compiled: subprocess.CompletedProcess[str]) -> None:
    assert compiled.returncode == 0, compiled.stderr


def test_any_number_of_rows_comes_in_the_form_that_the_kernel_was_compiled_for(compiled: subprocess.CompletedProcess[str]) -> None:
    forms = [line.replace("generic", "gmem") for line in compiled.stdout.splitlines() if "memref" in line]
    assert len(forms) == 12
    assert forms[::2] == forms[1::2]


@pytest.mark.parametrize(("name", "needs"), json.loads(TABLE.read_text(encoding="utf-8")).items())
def test_no_kernel_spills_and_each_uses_hoppers_own_instructions(name: str, needs: dict[str, int]) -> None:
    assert needs["spilled_bytes"] == 0
    assert needs["for_sm_90a"] == 1
    assert needs["wgmma"] > 0
    assert needs["tma"] > 0
