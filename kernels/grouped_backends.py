"""The implementations of a product by name: what each needs, why one can't be had, and the table by which `auto` chooses.

Grouped products are those of experts, dense ones (FP8 only) those of all other matrices.

Knows no tensors and imports no torch. `TABLE` is meant to be measured (benchmarks/h200.py): each entry says where it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

Name = Literal["torch", "triton", "deep_gemm", "cutlass"]
Kind = Literal["fp8", "bfloat16", "float32"]
"""What the rows and weights are."""
Layout = Literal["contiguous", "masked", "dense"]
NAMES: tuple[Name, ...] = ("deep_gemm", "cutlass", "triton", "torch")
"""Those that are expected to be fastest first."""
DENSE_NAMES: tuple[Name, ...] = ("deep_gemm", "triton", "torch")
"""Those with dense products."""
HOPPER = (9, 0)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """`module` has the four products of kernels/grouped_gemm.py, and `fp8_gemm` if it is one of `DENSE_NAMES` (None: torch's are
    beside the front functions). `alignment`: in the contiguous layout it wants an expert's rows to begin at a multiple of this.
    """

    module: str | None
    kinds: tuple[Kind, ...]
    alignment: int


BACKENDS: dict[Name, Backend] = {
    "deep_gemm": Backend(module="moesaic.kernels.deep_gemm", kinds=("fp8", "bfloat16"), alignment=128),
    "cutlass": Backend(module="moesaic.kernels.cute.grouped_gemm", kinds=("fp8", "bfloat16"), alignment=128),
    "triton": Backend(module="moesaic.kernels.triton.grouped_gemm", kinds=("fp8", "bfloat16", "float32"), alignment=1),
    "torch": Backend(module=None, kinds=("fp8", "bfloat16", "float32"), alignment=1),
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """For products of up to `most_rows` rows (per expert; None: any number), the backends, the one to take first; torch is last."""

    kind: Kind
    layout: Layout
    most_rows: int | None
    order: tuple[Name, ...]
    source: str


GUESS = "not measured: DeepGEMM first for its published H800 figures, then our own kernels, compiled for Hopper and never run"
TABLE: tuple[Rule, ...] = (
    Rule(kind="fp8", layout="masked", most_rows=64, order=("deep_gemm", "triton", "cutlass"), source=GUESS),
    Rule(kind="fp8", layout="masked", most_rows=None, order=("deep_gemm", "cutlass", "triton"), source=GUESS),
    Rule(kind="fp8", layout="contiguous", most_rows=None, order=("deep_gemm", "cutlass", "triton"), source=GUESS),
    Rule(kind="fp8", layout="dense", most_rows=None, order=("deep_gemm", "triton"), source=GUESS),
    Rule(kind="bfloat16", layout="masked", most_rows=64, order=("deep_gemm", "triton", "cutlass"), source=GUESS),
    Rule(kind="bfloat16", layout="masked", most_rows=None, order=("deep_gemm", "cutlass", "triton"), source=GUESS),
    Rule(kind="bfloat16", layout="contiguous", most_rows=None, order=("deep_gemm", "cutlass", "triton"), source=GUESS),
    Rule(kind="float32", layout="masked", most_rows=None, order=("triton",), source="the only kernel for float32"),
    Rule(kind="float32", layout="contiguous", most_rows=None, order=("triton",), source="the only kernel for float32"),
)


def rule_for(kind: Kind, layout: Layout, rows: int) -> Rule:
    """The table's entry for products of `rows` rows per expert."""
    fitting = (each for each in TABLE if each.kind == kind and each.layout == layout)
    return next(each for each in fitting if each.most_rows is None or rows <= each.most_rows)


def choose(kind: Kind, layout: Layout, rows: int, candidates: Sequence[Name]) -> Name:
    """The candidate that the table names first. Candidates are not empty; one alone is taken without a look."""
    if len(candidates) == 1:
        return candidates[0]
    order = (*rule_for(kind, layout, rows).order, "torch")
    return min(candidates, key=order.index)


def dense_unfit_reason(name: Name, width: int, depth: int) -> str | None:
    """Why a backend has no dense FP8 product with a weight [width, depth]; None if it has. DeepGEMM's limits are SGLang's."""
    if name not in DENSE_NAMES:
        return "has no dense product"
    if name == "deep_gemm" and (width % 64 or depth % 128):
        return f"wants [N, K] of multiples of 64 and 128, and a weight is [{width}, {depth}]"
    if name == "triton" and depth % 16:
        return f"wants K to be a multiple of 16, and a weight is [{width}, {depth}]"
    return None


def unfit_reason(name: Name, capability: tuple[int, int]) -> str | None:
    """Why a backend can't run here, on CUDA devices of this compute capability; None if it can. Imports what it needs."""
    if name == "torch":
        return None
    if capability != HOPPER:
        return f"made for Hopper (sm_90), and the device is sm_{capability[0]}{capability[1]}"
    if name == "deep_gemm":
        from moesaic.kernels import deep_gemm

        return deep_gemm.missing_reason()
    package, install = {"triton": ("triton", "triton"), "cutlass": ("cutlass", "nvidia-cutlass-dsl")}[name]
    return None if find_spec(package) else f"{package} is not installed (pip install {install})"
