"""Makes Triton's interpreter round as the hardware does, so that its results can be compared with torch's.

Triton 3.6's interpreter converts floats with a carry bug (a mantissa that rounds up into an odd exponent is lost) and multiplies
bfloat16 matrices as if their bits were integers. Here torch converts, and matrices are multiplied in float64. It also counts on
older versions of numpy, which took an array of one element for a number.
"""

from __future__ import annotations

import os

import torch

AVAILABLE = not torch.cuda.is_available()
"""On a machine with a GPU the kernels run on it instead: one process can't do both."""
if AVAILABLE:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402  the switch above is read by this import
from triton.runtime import interpreter  # noqa: E402

TORCH_TYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def _convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
    """Round to nearest even, and to the largest number where e4m3 has no infinity."""
    bits = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).reshape(-1).copy())
    values = bits.view(TORCH_TYPES[source.name]).double()
    if target.name == "fp8e4nv":
        values = values.clamp(-448.0, 448.0)
    converted = values.to(TORCH_TYPES[target.name]).view(torch.uint8).numpy()
    width = getattr(np, f"uint{target.primitive_bitwidth}")
    return converted.view(width).reshape(data.shape)


def _float64(handle: interpreter.TensorHandle) -> np.ndarray:
    kind = handle.get_element_ty()
    return _convert(handle.data, kind, tl.float64, None).view(np.float64)


def _dot(
    self: object, a: interpreter.TensorHandle, b: interpreter.TensorHandle, d: interpreter.TensorHandle, *rest: object
) -> interpreter.TensorHandle:
    """Rounded once, so that a row's result doesn't depend on how a library cuts a matrix of another height."""
    product = np.matmul(_float64(a), _float64(b)) + d.data
    return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)


_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


if AVAILABLE:
    interpreter._convert_float = _convert
    interpreter._patch_lang_tensor = _patch_tensor_and_index
    interpreter.InterpreterBuilder.create_dot = _dot
