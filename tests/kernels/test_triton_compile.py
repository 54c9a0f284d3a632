"""Every Triton kernel compiles for Hopper without a GPU, spills nothing, fits a multiprocessor, and needs what the table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[2] / "kernels" / "triton" / "resources.json"
RESOURCES: dict[str, dict[str, int]] = json.loads(TABLE.read_text(encoding="utf-8"))
MOST_SHARED_BYTES = 227 * 1024
REGISTERS_OF_A_MULTIPROCESSOR = 65536


@pytest.mark.timeout(550)
def test_every_kernel_compiles_for_hopper_and_needs_what_the_table_says() -> None:
    """In a process of its own: this one may hold Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "moesaic.kernels.triton.compile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "needs"), RESOURCES.items())
def test_no_kernel_spills_and_each_fits_a_multiprocessor(name: str, needs: dict[str, int]) -> None:
    assert needs["spilled_bytes"] == 0
    assert needs["shared_bytes"] <= MOST_SHARED_BYTES
    assert needs["registers"] * needs["warps"] * 32 <= REGISTERS_OF_A_MULTIPROCESSOR


def test_every_product_of_matrices_uses_hoppers_own_instructions() -> None:
    products = ("grouped_gemm", "mla_prefill", "mla_decode")
    needs = {name: needs for name, needs in RESOURCES.items() if name.startswith(products) and not name.endswith("merge")}
    assert len(needs) == 14
    assert [name for name, need in needs.items() if not need["wgmma"]] == []
