"""The deep_ep package: is it there and of the wanted generation, and what its opaque errors mean.

Imports it only when asked. DeepEP is built on the cluster it serves; what fails there are NVSHMEM, InfiniBand, NCCL and peers that
do not come, and its messages rarely say so. Knows no buffer.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moesaic.moe.deepep_config import Generation

_CLASSES: dict[Generation, str] = {"deepep": "Buffer", "deepep_v2": "ElasticBuffer"}
_INSTALL = (
    "build DeepEP on this cluster (github.com/deepseek-ai/DeepEP, ./install.sh; it needs NVSHMEM for `deepep`, NCCL >= 2.30.4 and "
    "torch >= 2.10 for `deepep_v2`), or use --moe-a2a-backend torch"
)
_LATE = "another rank did not take part in time: look for the rank whose operation is behind in /health and in the logs"
# Part of the library's message -> what it means and what helps. The first that matches counts.
_MEANINGS: tuple[tuple[str, str], ...] = (
    (
        "out of memory",
        "no room for its buffers: lower --mem-fraction-static or --deepep-max-dispatch-tokens-per-rank",
    ),
    ("CPU recv timeout", f"the counts of a dispatch did not arrive, and DeepEP does not say whose; {_LATE}"),
    ("unspecified launch failure", f"a kernel gave up waiting; 'DeepEP timeout' in this rank's log names src_rank; {_LATE}"),
    (
        "nvshmem|ibgda|ibv_|mlx5",
        "NVSHMEM could not start over InfiniBand: check that the NICs are up (ibstat), that nvidia-peermem or dma-buf and IBGDA "
        'are enabled (NVreg_RegistryDwords="PeerMappingOverride=1;" NVreg_EnableStreamMemOPs=1), and NVSHMEM_HCA_LIST',
    ),
    (
        "cudaIpc|IPC|invalid device context|peer access",
        "the ranks of a node can't map each other's GPU memory: all in one container with --ipc=host, all GPUs visible, NVLink up",
    ),
    (
        "NCCL|libnccl",
        "NCCL could not start: `deepep_v2` needs NCCL >= 2.30.4 with GIN, the one that torch has loaded; NCCL_DEBUG=INFO says more",
    ),
    ("QPs are not enough", "more queue pairs are wanted than were allocated: lower num_sms in --deepep-config"),
    ("num_nvl_bytes|num_rdma_bytes|num_buffer_bytes", "a buffer is smaller than the kernels want: report this as a bug of moesaic"),
)


class DeepEPError(RuntimeError):
    """DeepEP can't be had or failed; the message says why and what helps, the library's own words are in it and chained."""


def load(generation: Generation) -> Any:
    """The deep_ep module. Raises DeepEPError when it is missing or of the other generation."""
    try:
        library = importlib.import_module("deep_ep")
    except Exception as error:  # its import starts a JIT compiler and compares NCCL libraries, and may raise anything
        raise DeepEPError(f"deep_ep can't be imported ({_words(error)}); {_INSTALL}") from error
    if hasattr(library, _CLASSES[generation]):
        return library
    found = [name for name, has in _CLASSES.items() if hasattr(library, has)]
    version = getattr(library, "__version__", "unknown")
    instead = f"use --moe-a2a-backend {found[0]}, or install another DeepEP" if found else _INSTALL
    raise DeepEPError(f"deep_ep (version {version}) has no {_CLASSES[generation]}, which {generation} needs; {instead}")


def why_missing(generation: Generation) -> str | None:
    """Why this generation can't be had here; None if it can. Imports deep_ep."""
    try:
        load(generation)
    except DeepEPError as error:
        return str(error)
    return None


@contextmanager
def explained(doing: str, late_ranks: Callable[[str], str | None] = lambda message: None) -> Iterator[None]:
    """DeepEP's errors inside become DeepEPError. late_ranks: its message -> whom it has not heard from, where that can be known."""
    try:
        yield
    except DeepEPError:
        raise
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        words = _words(error)
        late = late_ranks(words)
        meaning = f"not heard from {late}; {_LATE}" if late else explain(words)
        raise DeepEPError(f"DeepEP failed to {doing}: {meaning} (DeepEP: {words})") from error


def explain(message: str) -> str:
    """What a message of DeepEP means."""
    for pattern, meaning in _MEANINGS:
        if re.search(pattern, message, re.IGNORECASE):
            return meaning
    return "see its own words"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
