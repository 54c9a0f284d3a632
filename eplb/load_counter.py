"""Tokens per logical expert since they were last taken. Many choices are counted at once, without a wait for the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moesaic.eplb.location import Int64Array

_MOST_HELD_CHOICES = 1 << 14
_MOST_HELD_TENSORS = 1 << 10


class LoadCounter:
    """One rank's counts, on the device where topk_ids live.

    Counting costs some calls however few the choices, as many as a small step can take without being noticed. So choices are held,
    those of several small steps together, until there are 16,384 (128 KiB) of them or they are asked for.
    """

    def __init__(self, *, num_layers: int, num_experts: int, device: torch.device | str = "cpu") -> None:
        self._num_layers = num_layers
        self._width = num_experts + 1  # column 0 takes the -1 of padding, so that no id needs a mask
        self._counts = torch.zeros(num_layers * self._width, dtype=torch.int64, device=device)
        self._first_columns: Int64Array = np.arange(num_layers) * self._width + 1
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._held: list[Tensor] = []
        self._held_layers: list[int] = []
        self._held_sizes: list[int] = []
        self._num_held = 0

    def record(self, layer_index: int, topk_ids: Tensor) -> None:
        """Count one layer's choices: its index among the sparse layers; topk_ids int64 [T, K], logical, -1 ignored.

        K is the same in all calls. Nobody may write into the tensor any more.
        """
        size = topk_ids.numel()
        self._held.append(topk_ids)
        self._held_layers.append(layer_index)
        self._held_sizes.append(size)
        self._num_held += size
        if self._num_held >= _MOST_HELD_CHOICES or len(self._held) >= _MOST_HELD_TENSORS:
            self._count_held()

    def counts(self) -> Int64Array:
        """A copy of the counts int64 [L, E]. Waits for the device."""
        self._count_held()
        counts: Int64Array = self._counts.view(self._num_layers, self._width)[:, 1:].cpu().numpy().copy()
        return counts

    def reset(self) -> None:
        """Begin again at zero."""
        self._let_go()
        self._counts.zero_()

    def take(self) -> Int64Array:
        """`counts`, then `reset`."""
        counts = self.counts()
        self.reset()
        return counts

    def _count_held(self) -> None:
        if not self._held:
            return
        columns = torch.cat(self._held)
        num_rows = np.array(self._held_sizes) // columns.shape[1]
        first_columns = np.repeat(self._first_columns[self._held_layers], num_rows)[:, None]
        first = torch.from_numpy(first_columns)
        # From other memory than pinned a copy may wait.
        columns += (first.pin_memory() if columns.is_cuda else first).to(columns.device, non_blocking=True)
        self._counts.scatter_add_(0, columns.view(-1), self._one.expand(self._num_held))
        self._let_go()

    def _let_go(self) -> None:
        self._held.clear()
        self._held_layers.clear()
        self._held_sizes.clear()
        self._num_held = 0
