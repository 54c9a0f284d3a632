"""A stand-in for FlashInfer's ragged prefill: the calls that we make, refused where the library would refuse them, in plain torch.

After flashinfer/prefill.py of flashinfer-ai/flashinfer (2026): plan(qo_indptr, kv_indptr, heads, heads, head_dim_qk,
head_dim_vo=...), then run(q, k, v); causal means aligned to the ends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class BatchPrefillWithRaggedKVCacheWrapper:
    num_plans = 0

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype is torch.uint8
        assert kv_layout == "NHD"
        self._plan: dict[str, Any] = {}

    def plan(  # noqa: PLR0917 - the library's own
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        q_data_type: torch.dtype = torch.float16,
    ) -> None:
        assert qo_indptr.dtype is kv_indptr.dtype is torch.int32
        assert len(qo_indptr) == len(kv_indptr)
        assert qo_indptr[0] == kv_indptr[0] == 0
        assert causal
        type(self).num_plans += 1
        self._plan = {
            "starts": (qo_indptr.tolist(), kv_indptr.tolist()),
            "shapes": ((num_qo_heads, head_dim_qk), (num_kv_heads, head_dim_qk), (num_kv_heads, head_dim_vo or head_dim_qk)),
            "scale": sm_scale,
            "dtype": q_data_type,
        }

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (rows, contexts), plan = self._plan["starts"], self._plan
        assert q.dtype is plan["dtype"]
        assert all(x.is_contiguous() and x.shape[1:] == shape for x, shape in zip((q, k, v), plan["shapes"], strict=True))
        assert (len(q), len(k), len(v)) == (rows[-1], contexts[-1], contexts[-1])
        out = q.new_empty(len(q), *plan["shapes"][2])
        for index in range(len(rows) - 1):
            own, context = slice(rows[index], rows[index + 1]), slice(contexts[index], contexts[index + 1])
            scores = torch.einsum("qhd,khd->hqk", q[own].double(), k[context].double()) * plan["scale"]
            beyond = torch.ones(scores.shape[1:]).triu(scores.shape[2] - scores.shape[1] + 1).bool()
            weights = scores.masked_fill(beyond, float("-inf")).softmax(-1)
            out[own] = torch.einsum("hqk,khd->qhd", weights, v[context].double()).to(out.dtype)
        return out


@contextmanager
def installed() -> Iterator[type[BatchPrefillWithRaggedKVCacheWrapper]]:
    """`import flashinfer` finds this."""
    module = ModuleType("flashinfer")
    module.BatchPrefillWithRaggedKVCacheWrapper = BatchPrefillWithRaggedKVCacheWrapper  # type: ignore[attr-defined]
    assert "flashinfer" not in sys.modules
    sys.modules["flashinfer"] = module
    BatchPrefillWithRaggedKVCacheWrapper.num_plans = 0
    try:
        yield BatchPrefillWithRaggedKVCacheWrapper
    finally:
        del sys.modules["flashinfer"]
