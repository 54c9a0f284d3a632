"""A stand-in for CUDA graphs on a CPU: a replay computes what was captured again, from the same addresses to the same address."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.launch.engine.graphs import Replay

num_replays = 0
"""In this process, of all graphs."""


class RepeatedCalls:
    """See graphs.GraphBackend. What was there before a replay is destroyed first, as it may be by other graphs of the same pool."""

    def capture(self, forward: Callable[[], Tensor]) -> Replay:
        logits = forward().clone()

        def replay() -> Tensor:
            global num_replays
            num_replays += 1
            logits.fill_(torch.nan)
            return logits.copy_(forward())

        return replay
