"""Recording of expert load over all ranks, switched by control commands in lockstep (start_record, stop_record, dump_record).

Each rank counts the choices of the tokens that it alone is responsible for. A dump of counts sums them over all ranks and rank 0
writes the file; a dump of single tokens is one file per rank. Off, it costs one comparison per step.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.eplb.recorder import ExpertLoadRecorder
from moesaic.eplb.token_recorder import ExpertTokenRecorder
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.models.deepseek_v3 import LoadObserver
from moesaic.launch.models.parallel import ParallelContext

STEPS_PER_WINDOW = 16
FOLDER_VARIABLE = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
"""SGLang's name for where dumps go; the system's temporary folder when it is not set."""


@dataclass(frozen=True, kw_only=True)
class RecordingSettings:
    """`buffer_size`: most windows kept, -1 for any number (stat: of 16 steps, per_pass: of one); a bound in bytes holds anyway.

    `model_name` goes into the file.
    """

    mode: Literal["stat", "per_pass", "per_token"] = "stat"
    buffer_size: int = 1000
    model_name: str = ""


class LoadRecording:
    """One rank's part of the recording."""

    def __init__(self, settings: RecordingSettings, config: ModelConfig, parallel: ParallelContext, device: str = "cpu") -> None:
        self._settings = settings
        self._parallel = parallel
        self._num_hidden_layers = config.num_hidden_layers
        self._recorder = _make_recorder(settings, config, device) if config.sparse_layers else None

    @property
    def dp_rank(self) -> int:
        return self._parallel.dp_rank

    @property
    def observer(self) -> LoadObserver | None:
        """What the model's sparse layers report to; None while off."""
        return None if self._recorder is None or not self._parallel.counts_tokens else self._recorder.observer

    def end_step(self, num_tokens: int, forward_mode: str, positions: Tensor) -> None:
        """`num_tokens` of all DP ranks went through the step; `positions` int64 [T] of this DP rank's."""
        if isinstance(self._recorder, ExpertLoadRecorder):
            self._recorder.end_step(num_tokens, forward_mode)
        elif self._recorder is not None:
            self._recorder.end_step(None if self._parallel.scatters_tokens else positions)

    def carry_out(self, command: str) -> str:
        """start_record, stop_record or dump_record; returns what to tell the client (for a dump, the file's path)."""
        if self._recorder is None:
            return "the model has no sparse layers"
        if command == "start_record":
            self._recorder.start()
            return "recording"
        if command == "stop_record":
            self._recorder.stop()
            return "stopped"
        assert command == "dump_record", f"unknown command {command!r}"
        if isinstance(self._recorder, ExpertLoadRecorder):
            return self._dump_counts(self._recorder)
        return self._dump_tokens(self._recorder)

    def _dump_counts(self, recorder: ExpertLoadRecorder) -> str:
        record = recorder.snapshot(model=self._settings.model_name)
        counts = torch.from_numpy(record.logical_count)
        if self._parallel.world_size > 1 and counts.numel():
            dist.all_reduce(counts, group=self._parallel.world_group)
        if self._parallel.rank != 0:
            return ""
        path = _new_file("")
        replace(record, logical_count=counts.numpy()).save(path, self._num_hidden_layers)
        return str(path)

    def _dump_tokens(self, recorder: ExpertTokenRecorder) -> str:
        """A file of this rank's own; ranks that see another's tokens have none."""
        if not self._parallel.counts_tokens:
            return ""
        path = _new_file(f"_rank{self._parallel.rank}")
        recorder.dump(path, model=self._settings.model_name)
        return str(path)


def _make_recorder(settings: RecordingSettings, config: ModelConfig, device: str) -> ExpertLoadRecorder | ExpertTokenRecorder:
    if settings.mode == "per_token":
        return ExpertTokenRecorder(
            layer_ids=config.sparse_layers, num_experts=config.n_routed_experts, top_k=config.num_experts_per_tok
        )
    return ExpertLoadRecorder(
        layer_ids=config.sparse_layers,
        num_experts=config.n_routed_experts,
        steps_per_window=1 if settings.mode == "per_pass" else STEPS_PER_WINDOW,
        max_windows=sys.maxsize if settings.buffer_size == -1 else settings.buffer_size,
        device=device,
        mode=settings.mode,
    )


def _new_file(suffix: str) -> Path:
    folder = Path(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"expert_distribution_recorder_{time.time():.3f}{suffix}.npz"
