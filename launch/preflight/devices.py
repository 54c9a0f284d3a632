"""GPUs, their driver, and the libraries that GPUs need: what is here, and whether the flags need it. Makes no CUDA context.

How a library's version is found is in `libraries.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moesaic.launch.gpus import Gpu, query_gpus
from moesaic.launch.preflight.findings import NOT_HERE, Finding, fail, ok, warn
from moesaic.launch.preflight.libraries import module_version, nccl_version, nvshmem_version

GIB = 1 << 30
BUSY_SHARE = 0.1
DEEPEP_REMEDY = "build it against this torch (https://github.com/deepseek-ai/DeepEP), or use --moe-a2a-backend torch"
NVSHMEM_REMEDY = (
    "set NVSHMEM_DIR to the one that DeepEP was built with, or pip install nvidia-nvshmem-cu12 (-cu13): a DeepEP without it "
    "knows neither low-latency steps nor other nodes"
)


def check_devices(*, needed: bool, num_wanted: int, a2a_backend: str) -> Iterator[Finding]:
    """`needed`: the flags ask for CUDA; else what is missing is no failure. `a2a_backend`: --moe-a2a-backend."""
    try:
        yield check_gpus(query_gpus(), needed=needed, num_wanted=num_wanted)
    except OSError as error:
        remedy = "repair the driver (dmesg | grep -i nvrm), or use --device cpu"
        yield (fail if needed else warn)("GPUs", str(error), remedy)
    yield _check_torch(needed)
    yield _check_nccl(needed)
    yield _check_library("DeepEP", "deep_ep", a2a_backend.startswith("deepep"), DEEPEP_REMEDY)
    yield check_nvshmem(needed=a2a_backend == "deepep")
    yield _check_library("DeepGEMM", "deep_gemm", False, "")


def check_gpus(gpus: Sequence[Gpu], *, needed: bool, num_wanted: int) -> Finding:
    """How many, which, and whether they are free."""
    if not gpus:
        if needed:
            return fail("GPUs", NOT_HERE, "run on a node with NVIDIA GPUs and their driver, or use --device cpu")
        return ok("GPUs", f"{NOT_HERE}; the flags need none")
    names = sorted({gpu.name for gpu in gpus})
    found = f"{len(gpus)} x {' and '.join(names)}, {min(gpu.total for gpu in gpus) / GIB:.0f} GiB, driver {gpus[0].driver}"
    if needed and len(gpus) < num_wanted:
        remedy = f"ask the scheduler for {num_wanted} GPUs, or use more nodes (--nnodes)"
        return fail("GPUs", f"{found}, for {num_wanted} ranks", remedy)
    if len(names) > 1:
        return warn("GPUs", found, "ranks run in lockstep: the slowest GPU decides; use nodes of one kind")
    busy = [gpu for gpu in gpus if gpu.total - gpu.free > BUSY_SHARE * gpu.total]
    if needed and busy:
        taken = ", ".join(f"{(gpu.total - gpu.free) / GIB:.0f} GiB of GPU {gpu.index}" for gpu in busy)
        return warn("GPUs", f"{found}; others hold {taken}", "end what runs there (nvidia-smi names it), or expect less KV")
    return ok("GPUs", found)


def _check_torch(needed: bool) -> Finding:
    import torch

    if torch.version.cuda is None:
        found = f"torch {torch.__version__} is a CPU build"
        if needed:
            return fail("CUDA", found, "pip install the torch of the driver's CUDA version (https://pytorch.org/get-started)")
        return ok("CUDA", f"{found}; the flags need none")
    found = f"torch {torch.__version__} with CUDA {torch.version.cuda}"
    if needed and not torch.cuda.device_count():
        remedy = "check CUDA_VISIBLE_DEVICES, and that the driver is new enough for it (nvidia-smi shows the newest CUDA it takes)"
        return fail("CUDA", f"{found} sees no GPU", remedy)
    return ok("CUDA", found)


def _check_nccl(needed: bool) -> Finding:
    version = nccl_version()
    if version is None and needed:
        return fail("NCCL", NOT_HERE, "install a CUDA build of torch: it brings NCCL")
    return ok("NCCL", version or f"{NOT_HERE}; the flags need none")


def check_nvshmem(*, needed: bool) -> Finding:
    """What DeepEP's first generation sends over; the second has NCCL."""
    version = nvshmem_version()
    if version is None and needed:  # no failure: DeepEP may have been built with one that only its own file names
        return warn("NVSHMEM", NOT_HERE, NVSHMEM_REMEDY)
    return ok("NVSHMEM", version or f"{NOT_HERE}; the flags need none")


def _check_library(what: str, module: str, needed: bool, remedy: str) -> Finding:
    version = module_version(module)
    if version is None and needed:
        return fail(what, NOT_HERE, remedy)
    return ok(what, version or f"{NOT_HERE}; the flags need none")
