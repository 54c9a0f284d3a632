"""Penalties on tokens that a request has seen: frequency, presence (OpenAI's) and repetition (CTRL, Keskar et al.
2019).

Knows logits and token counts, not requests. As in SGLang and vLLM, frequency and presence count output tokens only,
repetition counts prompt and output. As in SGLang, the two subtractions come first, the repetition scale after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from moesaic.kernels.gpu import upload


class TokenHistory:
    """Which tokens one request has seen, and how often it has produced each. O(1) per token, no [vocab] memory."""

    def __init__(self, prompt_ids: ArrayLike) -> None:
        """`prompt_ids` int [n]; leave it empty when the repetition penalty is 1 (nothing else reads the prompt)."""
        unique = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._size = len(unique)
        self._token_ids = np.concatenate([unique, np.zeros(16, dtype=np.int64)])
        self._counts = np.zeros(len(self._token_ids), dtype=np.float32)
        self._slots = {token_id: slot for slot, token_id in enumerate(unique.tolist())}

    def append(self, token_id: int) -> None:
        """Count one output token."""
        slot = self._slots.setdefault(token_id, self._size)
        if slot == self._size:
            self._size += 1
            if self._size > len(self._token_ids):
                self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._token_ids[slot] = token_id
        self._counts[slot] += 1

    @property
    def token_ids(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The distinct tokens seen, int64 [n] (a view)."""
        return self._token_ids[: self._size]

    @property
    def output_counts(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """How often each was produced, float32 [n] (a view); 0 for a token of the prompt only."""
        return self._counts[: self._size]


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """The penalties of a batch, sparse: N pairs (row, token id), each pair once, all tensors on the logits' device.

    frequency, presence, repetition float32 [B] (neutral: 0, 0, 1); rows, token_ids int64 [N]; output_counts float32
    [N].
    """

    frequency: Tensor
    presence: Tensor
    repetition: Tensor
    rows: Tensor
    token_ids: Tensor
    output_counts: Tensor

    @classmethod
    def make(
        cls,
        *,
        frequency: Sequence[float],
        presence: Sequence[float],
        repetition: Sequence[float],
        histories: Sequence[tuple[int, TokenHistory]],
        device: torch.device | str = "cpu",
    ) -> Penalties:
        """From one value per row (neutral where a row has no penalties) and (row, history) of those that have."""
        rows = np.array([row for row, _ in histories], dtype=np.int64)
        sizes = np.array([len(history.token_ids) for _, history in histories], dtype=np.int64)
        token_ids = np.concatenate([np.empty(0, dtype=np.int64), *(history.token_ids for _, history in histories)])
        counts = np.concatenate([np.empty(0, dtype=np.float32), *(history.output_counts for _, history in histories)])
        device = torch.device(device)
        values = upload(torch.tensor([frequency, presence, repetition], dtype=torch.float32), device)
        return cls(
            frequency=values[0],
            presence=values[1],
            repetition=values[2],
            rows=upload(torch.from_numpy(np.repeat(rows, sizes)), device),
            token_ids=upload(torch.from_numpy(token_ids), device),
            output_counts=upload(torch.from_numpy(counts), device),
        )

    def apply_(self, logits: Tensor) -> None:
        """Change logits float32 [B, V] in place: subtract frequency * count + presence, then scale by repetition."""
        values = logits[self.rows, self.token_ids]
        values -= self.frequency[self.rows] * self.output_counts
        values -= self.presence[self.rows] * (self.output_counts > 0)
        repetition = self.repetition[self.rows]
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits[self.rows, self.token_ids] = values
