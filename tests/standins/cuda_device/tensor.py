"""Tensors of the stand-in's device: each holds a CPU tensor, computes on it, and says that it is on `cuda:N`.

Operations that torch composes of others are decomposed first, so that the rules see what a device would. A factory without a device
tensor among its arguments comes here through the dispatch key CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import copies, graphs, rules, waits
from .guard import current_device

aten = torch.ops.aten
CPU = torch.device("cpu")
_WHOLE = {aten.scaled_dot_product_attention.default}
"""Composed in ways that depend on the device: computed as a whole."""
_VIEWLIKE = {aten._unsafe_view.default, aten.alias.default, aten.detach.default, aten.lift_fresh.default}


class DeviceTensor(torch.Tensor):
    """See the module's text. `inner`: the CPU tensor."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> DeviceTensor:
        with torch.inference_mode(False):  # whether it is an inference tensor, `inner` knows
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=device,
                requires_grad=False,
            )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return execute(function, arguments, named or {})

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.inner})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def record_stream(self, stream: Any) -> None:
        pass


def on_device(inner: Tensor, index: int | None = None) -> DeviceTensor:
    return DeviceTensor(inner, torch.device("cuda", current_device() if index is None else index))


def unwrapped(value: Any) -> Any:
    """CPU tensors in the place of device tensors, however nested."""
    return tree_map_only(DeviceTensor, lambda tensor: tensor.inner, value)


def execute(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """An operation with a device tensor among its arguments, or a factory that makes one."""
    special = _SPECIAL.get(function)
    if special is not None:
        return special(*arguments, **named)
    if function not in _WHOLE and function._can_decompose():
        result = function.decompose(*arguments, **named)
        if result is not NotImplemented:
            return result
    if function.namespace == "c10d":
        return _collective(function, arguments, named)
    rules.check(function, arguments, named, DeviceTensor)
    if function in rules.WAITING:
        waits.wait(function.overloadpacket.__name__)
    return _computed(function, arguments, dict(named))


def _computed(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    device = _target(arguments, named)
    if "device" in named:
        named["device"] = CPU
    named.pop("pin_memory", None)
    plain, plain_named = unwrapped((arguments, named))
    result = function(*plain, **plain_named)
    if function.overloadpacket.__name__.startswith(("empty", "new_empty")):
        tree_map_only(Tensor, copies.spoil, result)
    if graphs.is_capturing():
        graphs.record_operation(function, plain, plain_named, result, is_view=function.is_view or function in _VIEWLIKE)
    if device.type == "cpu":
        return result
    return _with_identity(function, arguments, named, result, device)


def _target(arguments: tuple[Any, ...], named: dict[str, Any]) -> torch.device:
    given = named.get("device")
    if given is not None:
        given = torch.device(given)
        return torch.device("cuda", current_device()) if given.type == "cuda" and given.index is None else given
    found: list[torch.device] = []
    tree_map_only(DeviceTensor, lambda tensor: found.append(tensor.device), (arguments, named))
    return found[0]


def _with_identity(function: Any, arguments: tuple[Any, ...], named: dict[str, Any], result: Any, device: torch.device) -> Any:
    """The result wrapped; what was written in place is the very argument."""
    schema = function._schema
    written = {
        next(iter(argument.alias_info.before_set)): arguments[place] if place < len(arguments) else named.get(argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    returns = [each.alias_info for each in schema.returns]
    if written and returns and returns[0] is not None and returns[0].is_write:
        same = [written[next(iter(info.before_set))] for info in returns]
        if torch.Tag.inplace_view in function.tags:
            with torch._C._DisableTorchDispatch():
                function(*arguments, **named)  # the same of sizes and strides alone
        assert all(each.shape == each.inner.shape for each in same if isinstance(each, DeviceTensor)), f"{function} resized"
        return same[0] if len(same) == 1 else tuple(same)
    return tree_map_only(Tensor, lambda tensor: DeviceTensor(tensor, device), result)


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    here, there = isinstance(target, DeviceTensor), isinstance(source, DeviceTensor)
    if here and there:
        return _computed(aten.copy_.default, (target, source), {})
    if here and source.dim() == 0 and not copies.is_pinned(source):
        non_blocking = False
    plain_target, plain_source = unwrapped((target, source))
    transfer = copies.to_device if here else copies.to_host
    if graphs.is_capturing():
        graphs.record_copy(plain_target, plain_source, is_async=non_blocking and copies.is_pinned(plain_source))
        plain_target.copy_(plain_source)
        return target
    transfer(plain_target, plain_source, non_blocking=non_blocking)
    return target


def _to_copy(
    source: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    target = source.device if device is None else torch.device(device)
    if isinstance(source, DeviceTensor) and target.type == "cuda":
        return _computed(aten._to_copy.default, (source,), {"dtype": dtype, "memory_format": memory_format})
    made = torch.empty_like(source.inner if isinstance(source, DeviceTensor) else source, dtype=dtype, device=CPU)
    if target.type == "cpu":
        # As torch: what goes to the host without a wait goes to pinned memory.
        made = copies.pin(made) if non_blocking else made
        return _copy_(made, source, non_blocking)
    return _copy_(DeviceTensor(made, _target((), {"device": target})), source, non_blocking)


def _index(source: Tensor, indices: list[Tensor | None]) -> Tensor:
    return _computed(aten.index.Tensor, (source, _indices(source, indices)), {})


def _index_put_(target: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    masked = [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]
    fills = len(masked) == 1 and len(indices) == 1 and values.numel() == 1 and not accumulate
    given = indices if fills else _indices(target, indices)
    if not isinstance(values, DeviceTensor) and values.dim():
        rules.check(aten.index_put_.default, (target, values), {}, DeviceTensor)
    return _computed(aten.index_put_.default, (target, given, values, accumulate), {})


def _indices(source: Tensor, indices: list[Tensor | None]) -> list[Tensor | None]:
    """On the device, those of the host copied there; a mask asks the device how many rows it has."""
    for index in indices:
        if index is None:
            continue
        if not isinstance(source, DeviceTensor):
            if isinstance(index, DeviceTensor):
                raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({source.device})")
        elif not isinstance(index, DeviceTensor):
            waits.wait("index from the host")
        if isinstance(index, DeviceTensor) and index.dtype in (torch.bool, torch.uint8):
            waits.wait("boolean index")
    return indices


def _repeat_interleave(repeats: Tensor, *, output_size: int | None = None) -> Tensor:
    if output_size is None:
        waits.wait("repeat_interleave without output_size")
    return _computed(aten.repeat_interleave.Tensor, (repeats,), {"output_size": output_size})


def _is_pinned(tensor: Tensor, device: Any = None) -> bool:
    return False


def _collective(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Of torch.distributed, by gloo on the CPU tensors."""
    plain, plain_named = unwrapped((arguments, named))
    result = function(*plain, **plain_named)
    if graphs.is_capturing():
        graphs.record_collective(function, plain, plain_named)
    outputs = tree_map_only(Tensor, lambda tensor: tensor, result)
    works = [
        each for each in (outputs if isinstance(outputs, (list, tuple)) else [outputs]) if not isinstance(each, (list, Tensor))
    ]
    first = arguments[0]
    return (first, *works) if isinstance(outputs, tuple) else result


_SPECIAL = {
    aten.copy_.default: _copy_,
    aten._to_copy.default: _to_copy,
    aten.index.Tensor: _index,
    aten._unsafe_index.Tensor: _index,
    aten.index_put_.default: _index_put_,
    aten._index_put_impl_.default: lambda target, indices, values, accumulate=False, unsafe=False: _index_put_(
        target, indices, values, accumulate
    ),
    aten.repeat_interleave.Tensor: _repeat_interleave,
    aten.is_pinned.default: _is_pinned,
}
