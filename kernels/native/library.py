"""The compiled CPU kernels as functions: pointers and sizes in, nothing checked. The front functions of kernels/ call them.

OpenMP is the library that torch has loaded already (same soname), so both use one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.native.build import shared_object

_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
SIGNATURES: dict[str, list[type]] = {
    "grouped_gemm": [_P, _P, _P, _I, _I, _I, _P, _P, _N],
    "head_product": [_P, _I, _I, _P, _I, _I, _I, _I, _I, _I, _I, _P, _N],
    "rms_norm": [_P, _I, _P, _I, _I, _F, _P, _N],
    "add_rms_norm": [_P, _P, _P, _I, _I, _F, _P, _P, _N],
    "swiglu": [_P, _I, _I, _P, _N],
    "weighted_rows": [_P, _P, _P, _I, _I, _I, _P, _N],
    "grouped_topk": [_P, _P, _I, _I, _I, _I, _I, _N, _F, _P, _P, _P, _N],
    "sort_choices": [_P, _I, _I, _I, _P, _P, _P, _P],
    "rope_in_place": [_P, _I, _I, _P, _P, _I, _I, _I],
    "write_latent": [_P, _I, _P, _F, _I, _I, _P, _P, _P, _I, _P],
    "mla_decode": [_P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _F, _P, _P, _P, _N],
    "mla_prefill": [_P, _P, _P, _I, _P, _P, _I, _I, _I, _I, _I, _F, _P, _P, _I, _N],
}


@dataclass(frozen=True, kw_only=True)
class Status:
    """`library` is None when the kernels can't be had here; `reason` then says why, else where they came from."""

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def status() -> Status:
    """Compile (a second or two, once per machine and version) and load. Never raises."""
    try:
        path = shared_object()
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return Status(library=None, reason=str(error))
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.sort_choices.restype = _I
    return Status(library=library, reason=str(path))


def kernels_for(x: Tensor) -> ctypes.CDLL | None:
    """The library if it can work on tensors like `x` (fp32 on the CPU), else None."""
    return status().library if x.dtype is torch.float32 and x.is_cpu else None
