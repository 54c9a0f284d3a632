"""Many tensors from the CPU to a device in one copy that nobody waits for. Knows no steps; `kernels.gpu.Download` is the way back.

What a step needs is made on the CPU by the thread that schedules, while a forward runs. A copy out of ordinary memory would wait
for that forward; one out of pinned memory takes its turn behind it. Each copy has pinned memory of its own, which torch's allocator
gives away again only when the copy has been made: nothing is overwritten on its way. On a CPU the same code copies at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

TreeT = TypeVar("TreeT")

ALIGNMENT = 16
"""Bytes: what the kernels load at once."""


def to_device(tree: TreeT, device: torch.device, *, leave: object = None) -> TreeT:
    """A tuple or frozen dataclass with CPU tensors anywhere in it -> the same with them on `device`: one copy, and no wait.

    Tensors that share memory share it there, too. Objects that may change, and `leave`, a part of the tree, stay as they are; so
    does everything if the device is the CPU.
    """
    return tree if device.type == "cpu" else copied(tree, device, leave)


def copied(tree: TreeT, device: torch.device, leave: object = None) -> TreeT:
    """As `to_device`, to any device."""
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _map(tree, collect, leave)
    host, starts = _packed(tensors, device)
    moved = torch.empty(len(host), dtype=torch.uint8, device=device).copy_(host, non_blocking=True)
    copies = iter([_alike(tensor, moved, starts[_key(tensor)]) for tensor in tensors])
    result: TreeT = _map(tree, lambda tensor: next(copies), leave)
    return result


def pinned(num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """CPU memory out of which a copy to `device` waits for nothing."""
    return torch.empty(num_elements, dtype=dtype, pin_memory=device.type == "cuda")


_Key = tuple[int, int]


def _key(tensor: Tensor) -> _Key:
    """Of the memory that it lies in."""
    memory = tensor.untyped_storage()
    return memory.data_ptr(), memory.nbytes()


def _packed(tensors: list[Tensor], device: torch.device) -> tuple[Tensor, dict[_Key, int]]:
    """The bytes of all tensors' memories, uint8, pinned, and where each memory begins."""
    starts: dict[_Key, int] = {}
    memories: list[Tensor] = []
    size = 0
    for tensor in tensors:
        key = _key(tensor)
        if key not in starts:
            starts[key] = size
            memories.append(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()))
            size += -(-key[1] // ALIGNMENT) * ALIGNMENT
    host = pinned(size, torch.uint8, device)
    for memory, start in zip(memories, starts.values(), strict=True):
        host[start:][: len(memory)].copy_(memory)
    return host, starts


def _alike(tensor: Tensor, memory: Tensor, start: int) -> Tensor:
    """What `tensor` is in its own memory, in uint8 `memory` from byte `start` on."""
    flat = memory[start:][: tensor.untyped_storage().nbytes()].view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset() + tensor.storage_offset())


def _map(part: Any, function: Callable[[Tensor], Tensor], leave: object = None) -> Any:
    """`function` of every tensor in a tree; what has none in it stays the same object."""
    if isinstance(part, Tensor):
        return function(part)
    if isinstance(part, tuple):
        items = tuple(_map(item, function, leave) for item in part)
        return items if any(new is not old for new, old in zip(items, part, strict=True)) else part
    if part is leave or not _is_frozen_dataclass(part):
        return part
    old = {field.name: getattr(part, field.name) for field in fields(part)}
    new = {name: moved for name, value in old.items() if (moved := _map(value, function, leave)) is not value}
    return replace(part, **new) if new else part


def _is_frozen_dataclass(part: object) -> bool:
    params = getattr(part, "__dataclass_params__", None)
    return params is not None and params.frozen
