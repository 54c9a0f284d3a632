"""DeepEP for the layers of one model: the buffer that they share, of either generation, and a dispatcher for each.

Knows no weights. Making it is collective. A forward is framed by `enter` and `leave`, which no graph may capture: the one may have
something to clean, the other asks who was late, for `verify` to see once the device has been waited for.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic.launch.models.parallel import ParallelContext
from moesaic.moe.communication import Communications
from moesaic.moe.deepep_config import DeepEPSettings, ExchangeShape
from moesaic.moe.deepep_limits import violations
from moesaic.moe.deepep_v1 import DeepEPBuffer, DeepEPDispatcher
from moesaic.moe.deepep_v2 import ElasticDeepEPBuffer, ElasticDeepEPDispatcher
from moesaic.moe.dispatch_mode import DispatchMode
from moesaic.moe.dispatcher import Dispatcher


class DeepEP:
    """Raises ValueError for what DeepEP does not support, DeepEPError when it is missing or can't start."""

    def __init__(
        self,
        parallel: ParallelContext,
        settings: DeepEPSettings,
        shape: ExchangeShape,
        device: torch.device,
        communications: Communications,
    ) -> None:
        first = parallel.a2a_backend == "deepep"
        found = list(violations("deepep" if first else "deepep_v2", settings, shape))
        if found:
            raise ValueError(f"{parallel.a2a_backend}: " + "; ".join(f"{each.reason} ({each.remedy})" for each in found))
        assert parallel.world_group is not None, "two ranks or more have a group"
        self._communications = communications
        self._buffer: DeepEPBuffer | ElasticDeepEPBuffer
        if first:
            self._buffer = DeepEPBuffer(settings=settings, shape=shape, group=parallel.world_group, device=device)
        else:
            self._buffer = ElasticDeepEPBuffer(settings=settings, shape=shape, group=parallel.world_group, device=device)

    def dispatcher(self, alignment: int, *, fp8_rows: bool) -> Dispatcher[Any]:
        """For one layer. alignment: rows per expert block in normal mode. fp8_rows: what travels as FP8 reaches the experts so."""
        posts = self._communications
        if isinstance(self._buffer, DeepEPBuffer):
            return DeepEPDispatcher(self._buffer, communications=posts, alignment=alignment, fp8_rows=fp8_rows)
        return ElasticDeepEPDispatcher(self._buffer, communications=posts, alignment=alignment, fp8_rows=fp8_rows)

    def enter(self, mode: DispatchMode) -> None:
        """Before a forward whose dispatches take this mode. Collective."""
        self._buffer.enter(mode)

    def leave(self) -> None:
        """After a forward."""
        self._buffer.leave()

    def verify(self) -> None:
        """Raises DeepEPError when a rank was given up on during the forward."""
        self._buffer.verify()
