"""Process groups for ranks that share a GPU: gloo, with device tensors passing through host memory. For tests, not for speed.

NCCL takes one rank per GPU, and gloo knows only some collectives of device tensors. A `StagedGroup` stands in a process group's
place (`dist.new_group(backend=STAGED)`), so that those who send and wait know nothing of it. CPU tensors go straight to gloo.
To submit is to wait for the device, for what is sent must be there, and whatever used the received tensor's memory must be over;
a received tensor is filled by whoever waits, or by gloo's thread where somebody wants to be told.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STAGED = "staged"
_ProcessGroup: Any = dist.ProcessGroup
"""Its annotations, and the names of what torch's functions call, change from release to release."""


class StagedWork:
    """A collective under way, as `dist.Work`: `arrive` copies what was received to where it belongs, once."""

    def __init__(self, work: dist.Work, arrive: Callable[[], None]) -> None:
        self._work = work
        self._arrive: Callable[[], None] | None = arrive
        self._lock = threading.Lock()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Raises RuntimeError when it failed, or after the group's deadline or this one."""
        if timeout is None:
            self._work.wait()
        else:
            self._work.wait(timeout)
        self._complete()
        return True

    def is_completed(self) -> bool:
        """As gloo's messages from rank to rank, it is complete only for who waits."""
        return self._arrive is None

    def get_future(self) -> torch.futures.Future[Any]:
        """Of collectives; messages from rank to rank have none."""
        return self._work.get_future().then(self._completed)

    def _completed(self, future: torch.futures.Future[Any]) -> Any:
        value = future.value()  # raises what went wrong
        self._complete()
        return value

    def _complete(self) -> None:
        with self._lock:
            if self._arrive is not None:
                self._arrive()
                self._arrive = None


class StagedGroup(_ProcessGroup):  # type: ignore[misc]
    """The operations that moesaic uses, under the names by which torch's functions call them. everything: CPU tensors too."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, *, everything: bool = False) -> None:
        super().__init__(rank, size)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        self._everything = everything

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return STAGED

    def _get_backend(self, device: torch.device) -> Any:
        return self._gloo

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        return self._run(lambda hosts: self._gloo.allreduce(hosts, opts), tensors, tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        return self._run(lambda hosts: self._gloo.broadcast(hosts, opts), tensors, tensors)

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Any) -> Any:
        return self._run(lambda hosts: self._gloo._allgather_base(*hosts, opts), [output, source], [output])

    def all_to_all_single(
        self, output: Tensor, source: Tensor, output_splits: list[int], source_splits: list[int], opts: Any
    ) -> Any:
        splits = (output_splits, source_splits)
        return self._run(lambda hosts: self._gloo.alltoall_base(*hosts, *splits, opts), [output, source], [output])

    # torch before 2.13 calls them so.
    _allgather_base = all_gather_single
    alltoall_base = all_to_all_single

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        return self._run(lambda hosts: self._gloo.send(hosts, rank, tag), tensors, [])

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        return self._run(lambda hosts: self._gloo.recv(hosts, rank, tag), tensors, tensors)

    def barrier(self, opts: Any) -> Any:
        return self._gloo.barrier(opts)

    def _run(self, post: Callable[[list[Tensor]], Any], tensors: Sequence[Tensor], filled: Sequence[Tensor]) -> Any:
        """filled: those of `tensors` that will have been written to when the work is complete."""
        staged = [self._everything or tensor.device.type != "cpu" for tensor in tensors]
        if not any(staged):
            return post(list(tensors))
        _settle(tensors)
        # What is only received is copied too, which is simpler than to say of each operation what it reads.
        hosts = [tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu() for tensor in tensors]
        pairs = [(tensor, host) for tensor, host in zip(tensors, hosts, strict=True) if any(tensor is each for each in filled)]
        return StagedWork(post(hosts), partial(_copy, pairs))


def _settle(tensors: Sequence[Tensor]) -> None:
    """Until everything that was submitted to their device's current stream is over."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Into the first of each pair, and wait for it: another thread's stream may be the next to read it."""
    with torch.inference_mode():
        for tensor, host in pairs:
            tensor.copy_(host)
        _settle([tensor for tensor, _ in pairs])


def register_staged(name: str = STAGED, *, everything: bool = False) -> None:
    """Make the backend known to torch.distributed in this process, and let torch's symmetric memory take two ranks on a GPU.

    Again is no harm.
    """
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    if not hasattr(dist.Backend, name.upper()):
        dist.Backend.register_backend(name, partial(StagedGroup, everything=everything), devices=["cpu", "cuda"])
