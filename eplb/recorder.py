"""Counts which logical experts the tokens of this rank choose, per sparse layer, in windows of steps ('stat' mode).

Knows one rank: the caller sums `snapshot` over ranks (windows line up, since ranks step together). Memory is bounded: a
ring of the last windows. Cost: one comparison per layer when off; when on, one scatter-add per layer with no wait for
the device, and one small copy to the host per window.

An example: 58 sparse layers x 256 experts in int32 is 59 kB per window; 1,000 windows of 16 steps hold 59 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.eplb.load_record import LoadRecord


class ExpertLoadRecorder:
    """Off until `start`. Per step: `record` for every sparse layer (and micro-batch), then `end_step` once."""

    def __init__(
        self,
        *,
        layer_ids: Sequence[int],
        num_experts: int,
        steps_per_window: int = 1,
        max_windows: int = 1000,
        max_bytes: int = 64 << 20,
        device: torch.device | str = "cpu",
    ) -> None:
        """`layer_ids`: the model's sparse layers, ascending; `num_experts`: logical, without redundant ones.

        `device` is where topk_ids live. The ring holds at most `max_windows` windows and `max_bytes` bytes of host
        memory (grown as windows come). Raises ValueError when that is not one window.
        """
        window_bytes = len(layer_ids) * num_experts * np.dtype(np.int32).itemsize
        self.max_windows = min(max_windows, max_bytes // max(window_bytes, 1))
        if self.max_windows < 1 or steps_per_window < 1 or window_bytes < 1:
            raise ValueError(
                "the load recorder needs at least one layer, expert, step per window and window: got "
                f"{len(layer_ids)} layers, {num_experts} experts, steps_per_window {steps_per_window}, "
                f"max_windows {max_windows}, max_bytes {max_bytes} (one window takes {window_bytes} bytes)"
            )
        self.layer_ids = np.asarray(layer_ids, dtype=np.int32)
        self.num_experts = num_experts
        self.steps_per_window = steps_per_window
        self.is_recording = False
        # Column 0 takes the -1 of padding, so that no id needs a mask.
        self._open_counts = torch.zeros(len(layer_ids), num_experts + 1, dtype=torch.int64, device=device)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self._open_counts.zero_()
        self._open_steps = 0
        self._open_tokens = 0
        self._ring: list[tuple[NDArray[np.int32], int]] = []  # (counts, tokens) of closed windows
        self._next_slot = 0  # of the ring, once it is full: the oldest window

    def start(self) -> None:
        """Begin a new recording: forgets the last one, as SGLang does."""
        self.reset()
        self.is_recording = True

    def stop(self) -> None:
        """Count no more; what was counted stays until `reset` or `start`."""
        self.is_recording = False

    def record(self, layer_index: int, topk_ids: Tensor) -> None:
        """Count one layer's choices: its index among the sparse layers; topk_ids int64 [T, K], logical, -1 ignored."""
        if self.is_recording:
            shifted = topk_ids.flatten() + 1
            self._open_counts[layer_index].scatter_add_(0, shifted, self._one.expand(len(shifted)))

    def end_step(self, num_tokens: int) -> None:
        """Close the step: `num_tokens` real tokens of this rank went through it (0 if idle; the step counts too)."""
        if not self.is_recording:
            return
        self._open_steps += 1
        self._open_tokens += num_tokens
        if self._open_steps == self.steps_per_window:
            self._close_window()

    def snapshot(self, *, model: str = "", domain: str = "") -> LoadRecord:
        """What this rank has counted, oldest window first; a window still open comes last. May have 0 windows."""
        windows = self._ring[self._next_slot :] + self._ring[: self._next_slot]
        if self._open_steps:
            windows.append((self._host_counts(), self._open_tokens))
            windows = windows[-self.max_windows :]
        shape = (len(windows), len(self.layer_ids), self.num_experts)
        return LoadRecord(
            logical_count=np.array([counts for counts, _ in windows], dtype=np.int64).reshape(shape),
            layer_ids=self.layer_ids,
            num_tokens=np.array([num_tokens for _, num_tokens in windows], dtype=np.int64),
            model=model,
            domain=domain,
        )

    def dump(self, path: str | Path, *, model: str = "", domain: str = "", num_hidden_layers: int | None = None) -> LoadRecord:
        """Write this rank's snapshot to `path` (.npz, or .pt as SGLang's; see load_record.py) and return it."""
        record = self.snapshot(model=model, domain=domain)
        record.save(path, num_hidden_layers)
        return record

    def _host_counts(self) -> NDArray[np.int32]:
        counts: NDArray[np.int64] = self._open_counts[:, 1:].cpu().numpy()
        assert counts.max() < 2**31, "a window counted more than int32 holds; use fewer steps per window"
        return counts.astype(np.int32)

    def _close_window(self) -> None:
        window = (self._host_counts(), self._open_tokens)
        if len(self._ring) < self.max_windows:
            self._ring.append(window)
        else:
            self._ring[self._next_slot] = window
            self._next_slot = (self._next_slot + 1) % self.max_windows
        self._open_counts.zero_()
        self._open_steps = 0
        self._open_tokens = 0
