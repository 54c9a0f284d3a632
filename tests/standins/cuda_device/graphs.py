"""CUDA graphs: what a thread does to device tensors while it captures is written down, and done again by a replay.

A replay computes every operation again from the same memory into the same memory. What Python decided during the capture stays
decided, and what a capture may not do (wait, copy from pageable memory) raises. Graphs share one pool: what a
graph made is rubbish when its replay begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import copies, waits

Action = Callable[[], None]
_thread = threading.local()


class Recording:
    """`actions` in order, and the memory that the captured operations made."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self.made: list[Tensor] = []


def is_capturing() -> bool:
    return getattr(_thread, "recording", None) is not None


def add(action: Action, made: Sequence[Tensor] = ()) -> None:
    """To the capture of this thread."""
    _thread.recording.actions.append(action)
    _thread.recording.made.extend(made)


def record_operation(function: Any, arguments: Any, named: dict[str, Any], result: Any, *, is_view: bool) -> None:
    """CPU tensors all. A view is where it is; other results are written again."""
    if is_view:
        return
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    given = {id(leaf) for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)}
    taken = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)}
    new = [output for output in outputs if id(output) not in given and output.untyped_storage().data_ptr() not in taken]

    def again() -> None:
        repeated = [leaf for leaf in tree_leaves(function(*arguments, **named)) if isinstance(leaf, Tensor)]
        for output, value in zip(outputs, repeated, strict=True):
            if any(output is each for each in new):
                output.copy_(value)

    add(again, new)


def record_copy(target: Tensor, source: Tensor, *, is_async: bool) -> None:
    """Between host and device: read again at each replay."""
    if not is_async:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing (a copy from or to pageable memory)")
    add(lambda: target.copy_(source) and None)


def record_collective(function: Any, arguments: Any, named: dict[str, Any]) -> None:
    def again() -> None:
        for leaf in tree_leaves(function(*arguments, **named)):
            if hasattr(leaf, "wait"):
                leaf.wait()

    add(again)


class CUDAGraph:
    """See torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._recording: Recording | None = None
        self.num_replays = 0

    def register_generator_state(self, generator: torch.Generator) -> None:
        assert generator.device.type == "cuda", "a graph registers the generators of its device"

    @torch.inference_mode()
    def replay(self) -> None:
        assert self._recording is not None, "nothing was captured"
        assert not is_capturing(), "a replay inside a capture"
        self.num_replays += 1
        for made in self._recording.made:
            copies.spoil(made)
        for action in self._recording.actions:
            action()


class Capture:
    """See torch.cuda.graph."""

    def __init__(self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode in {"global", "thread_local", "relaxed"}, capture_error_mode
        self._graph = cuda_graph

    def __enter__(self) -> None:
        waits.wait("begin of a capture")
        assert not is_capturing(), "a capture inside a capture"
        _thread.recording = Recording()

    def __exit__(self, kind: Any, *_: Any) -> None:
        recording, _thread.recording = _thread.recording, None
        if kind is None:
            # Nothing ran yet: what the capture seemed to compute isn't there before a replay.
            for made in recording.made:
                copies.spoil(made)
            self._graph._recording = recording


waits.is_capturing = is_capturing
