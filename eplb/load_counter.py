"""Tokens per logical expert since they were last taken. One count for all layers of a step, no wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.eplb.location import Int64Array


class LoadCounter:
    """One rank's counts, on the device where topk_ids live. Choices are held until those of all layers can be counted at once."""

    def __init__(self, *, num_layers: int, num_experts: int, device: torch.device | str = "cpu") -> None:
        self._num_layers = num_layers
        self._width = num_experts + 1  # column 0 takes the -1 of padding, so that no id needs a mask
        self._counts = torch.zeros(num_layers * self._width, dtype=torch.int64, device=device)
        self._first_columns = torch.arange(num_layers, device=device) * self._width + 1
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._held: list[tuple[int, Tensor]] = []

    def record(self, layer_index: int, topk_ids: Tensor) -> None:
        """Count one layer's choices: its index among the sparse layers; topk_ids int64 [T, K], logical, -1 ignored.

        The tensor must stay as it is until the step ends.
        """
        self._held.append((layer_index, topk_ids))
        if len(self._held) == self._num_layers:
            self._count_held()

    def counts(self) -> Int64Array:
        """A copy of the counts int64 [L, E]. Waits for the device."""
        self._count_held()
        counts: Int64Array = self._counts.view(self._num_layers, self._width)[:, 1:].cpu().numpy().copy()
        return counts

    def reset(self) -> None:
        """Begin again at zero."""
        self._held.clear()
        self._counts.zero_()

    def take(self) -> Int64Array:
        """`counts`, then `reset`."""
        counts = self.counts()
        self.reset()
        return counts

    def _count_held(self) -> None:
        if not self._held:
            return
        layers = [layer for layer, _ in self._held]
        choices = [ids for _, ids in self._held]
        first_columns = self._first_columns if layers == list(range(self._num_layers)) else self._first_columns[layers]
        if all(ids.shape == choices[0].shape for ids in choices):
            columns = torch.stack(choices).flatten(1).add_(first_columns.unsqueeze(1))
        else:
            sizes = torch.tensor([ids.numel() for ids in choices], device=self._counts.device)
            columns = torch.cat([ids.flatten() for ids in choices]).add_(first_columns.repeat_interleave(sizes))
        self._held.clear()
        self._counts.scatter_add_(0, columns.view(-1), self._one.expand(columns.numel()))
