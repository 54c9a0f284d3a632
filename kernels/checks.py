"""What a front function refuses before a kernel sees it: ValueErrors that name function, argument, what came and what is wanted.

Knows shapes, dtypes, strides and devices; knows no operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INDICES = (torch.int64, torch.int32)


def check_tensor(
    function: str,
    argument: str,
    tensor: Tensor,
    *,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    like: Tensor | None = None,
    contiguous: bool = False,
) -> None:
    """Refuse a tensor of another shape (None: any size), dtype or device (that of `like`), or whose last dimension has gaps.

    With `contiguous` no dimension may have gaps. Raises ValueError.
    """
    fits = tensor.dim() == len(shape) and all(want is None or got == want for got, want in zip(tensor.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{function}: {argument} has shape {list(tensor.shape)}, wanted [{wanted}]")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{function}: {argument} is {str(tensor.dtype).removeprefix('torch.')}, wanted {wanted}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{function}: {argument} is on {tensor.device}, wanted {like.device}, where the first argument is")
    if not tensor.numel():
        return  # nothing to step over: strides of empty tensors are anything
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{function}: {argument} has strides {list(tensor.stride())}, wanted a contiguous tensor")
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{function}: {argument} has strides {list(tensor.stride())}, wanted 1 in the last dimension")


def check_number(function: str, argument: str, got: int, *, at_least: int, at_most: int | None = None) -> None:
    """Refuse a number outside [at_least, at_most]. Raises ValueError."""
    if got < at_least or (at_most is not None and got > at_most):
        wanted = f"{at_least} or more" if at_most is None else f"{at_least} to {at_most}"
        raise ValueError(f"{function}: {argument} is {got}, wanted {wanted}")
