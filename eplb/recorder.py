"""Counts which logical experts the tokens of this rank choose, per sparse layer, in windows of steps.

    mode      a window is                          for
    stat      `steps_per_window` steps             rebalancing and reports: always cheap
    per_pass  one step, with its forward mode      balancedness of prefill and of decode, each on its own

(What every single token chose is recorded by token_recorder.py.) Knows one rank: the caller sums `snapshot` over ranks
(windows line up, since ranks step together). Memory is bounded: a ring of the last windows; how many older ones it dropped is
told. Cost: one comparison per layer when off; when on, a note per layer, a scatter-add for every 16,384 choices, neither of which
waits for the device, and one small copy to the host, which waits, per window.

An example: 58 sparse layers x 256 experts in int32 is 59 kB per window; 1,000 windows of 16 steps hold 59 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.eplb.load_counter import LoadCounter
from moesaic.eplb.load_record import LoadRecord

RecorderMode = Literal["stat", "per_pass"]


class _Window(NamedTuple):
    counts: NDArray[np.int32]  # [num_layers, num_experts]
    num_tokens: int
    forward_mode: str


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
        mode: RecorderMode = "stat",
    ) -> None:
        """`layer_ids`: the model's sparse layers, ascending; `num_experts`: logical, without redundant ones.

        `device` is where topk_ids live. The ring holds at most `max_windows` windows and `max_bytes` bytes of host
        memory (grown as windows come). Raises ValueError when that is not one window, or `mode` is per_pass and a window more
        than one step.
        """
        if mode not in get_args(RecorderMode):
            raise ValueError(f"the load recorder has no mode '{mode}'; choose one of {', '.join(get_args(RecorderMode))}")
        if mode == "per_pass" and steps_per_window != 1:
            raise ValueError(f"in mode per_pass a window is one step: steps_per_window must be 1, got {steps_per_window}")
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
        self.mode = mode
        self.is_recording = False
        self._open = LoadCounter(num_layers=len(layer_ids), num_experts=num_experts, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self._open.reset()
        self._open_steps = 0
        self._open_tokens = 0
        self._open_mode = ""
        self._num_closed = 0
        self._ring: list[_Window] = []  # closed window number i is at i % max_windows

    def start(self) -> None:
        """Begin a new recording: forgets the last one, as SGLang does."""
        self.reset()
        self.is_recording = True

    def stop(self) -> None:
        """Count no more; what was counted stays until `reset` or `start`."""
        self.is_recording = False

    @property
    def observer(self) -> Callable[[int, Tensor], None] | None:
        """As `record`, without its comparison: for the length of one step. None while off."""
        return self._open.record if self.is_recording else None

    def record(self, layer_index: int, topk_ids: Tensor) -> None:
        """Count one layer's choices: its index among the sparse layers; topk_ids int64 [T, K], logical, -1 ignored."""
        if self.is_recording:
            self._open.record(layer_index, topk_ids)

    def end_step(self, num_tokens: int, forward_mode: str = "") -> None:
        """Close the step: `num_tokens` real tokens of this rank went through it (0 if idle; the step counts too).

        `forward_mode`, such as prefill or decode, is kept in mode per_pass.
        """
        if not self.is_recording:
            return
        self._open_steps += 1
        self._open_tokens += num_tokens
        self._open_mode = forward_mode
        if self._open_steps == self.steps_per_window:
            self._close_window()

    def snapshot(self, *, model: str = "", domain: str = "") -> LoadRecord:
        """What this rank has counted, oldest window first; a window still open comes last. May have 0 windows."""
        oldest = self._num_closed % len(self._ring) if self._ring else 0
        windows = self._ring[oldest:] + self._ring[:oldest]
        if self._open_steps:
            windows.append(self._open_window())
            windows = windows[-self.max_windows :]
        shape = (len(windows), len(self.layer_ids), self.num_experts)
        return LoadRecord(
            logical_count=np.array([window.counts for window in windows], dtype=np.int64).reshape(shape),
            layer_ids=self.layer_ids,
            num_tokens=np.array([window.num_tokens for window in windows], dtype=np.int64),
            model=model,
            domain=domain,
            forward_modes=tuple(window.forward_mode for window in windows) if self.mode == "per_pass" else None,
            num_dropped=self._num_closed + bool(self._open_steps) - len(windows),
        )

    def dump(self, path: str | Path, *, model: str = "", domain: str = "", num_hidden_layers: int | None = None) -> LoadRecord:
        """Write this rank's snapshot to `path` (.npz, or .pt as SGLang's; see load_record.py) and return it."""
        record = self.snapshot(model=model, domain=domain)
        record.save(path, num_hidden_layers)
        return record

    def _open_window(self) -> _Window:
        assert self._open_tokens < 2**31, "a window may have counted more than int32 holds; use fewer steps per window"
        return _Window(self._open.counts().astype(np.int32), self._open_tokens, self._open_mode)

    def _close_window(self) -> None:
        window = self._open_window()
        if len(self._ring) < self.max_windows:
            self._ring.append(window)
        else:
            self._ring[self._num_closed % self.max_windows] = window
        self._num_closed += 1
        self._open.reset()
        self._open_steps = 0
        self._open_tokens = 0
