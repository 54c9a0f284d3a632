"""Recording of expert load over all ranks, switched by control commands in lockstep (start_record, stop_record, dump_record).

Each rank counts the choices of the tokens that it alone is responsible for; a dump sums them over all ranks and rank 0 writes the
file. Off, it costs one comparison per step.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from moesaic.eplb.recorder import ExpertLoadRecorder
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.models.deepseek_v3 import LoadObserver
from moesaic.launch.models.parallel import ParallelContext

STEPS_PER_WINDOW = 16
FOLDER_VARIABLE = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
"""SGLang's name for where dumps go; the system's temporary folder when it is not set."""


class LoadRecording:
    """One rank's part of the recording. `model_name` goes into the file."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext, model_name: str = "", device: str = "cpu") -> None:
        self._parallel = parallel
        self._model_name = model_name
        self._num_hidden_layers = config.num_hidden_layers
        self._recorder = None
        if config.sparse_layers:
            self._recorder = ExpertLoadRecorder(
                layer_ids=config.sparse_layers,
                num_experts=config.n_routed_experts,
                steps_per_window=STEPS_PER_WINDOW,
                device=device,
            )
        # The ranks of one attention-TP group see the same tokens, unless each of them dispatches its own share.
        self._counts_own = parallel.attn_tp_rank == 0 or parallel.scatters_tokens

    @property
    def dp_rank(self) -> int:
        return self._parallel.dp_rank

    @property
    def observer(self) -> LoadObserver | None:
        """What the model's sparse layers report to; None while off."""
        recorder = self._recorder
        return recorder.record if recorder is not None and recorder.is_recording and self._counts_own else None

    def end_step(self, num_tokens: int) -> None:
        """`num_tokens` of all DP ranks went through the step."""
        if self._recorder is not None:
            self._recorder.end_step(num_tokens)

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
        return self._dump(self._recorder)

    def _dump(self, recorder: ExpertLoadRecorder) -> str:
        record = recorder.snapshot(model=self._model_name)
        counts = torch.from_numpy(record.logical_count)
        if self._parallel.world_size > 1 and counts.numel():
            dist.all_reduce(counts, group=self._parallel.world_group)
        if self._parallel.rank != 0:
            return ""
        folder = Path(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir())
        path = folder / f"expert_distribution_recorder_{time.time():.3f}.npz"
        folder.mkdir(parents=True, exist_ok=True)
        replace(record, logical_count=counts.numpy()).save(path, self._num_hidden_layers)
        return str(path)
