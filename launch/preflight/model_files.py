"""Whether the model's folder can be read and is complete, as findings."""

from __future__ import annotations

from pathlib import Path

from moesaic.launch.models.checkpoint_files import CheckpointFiles, inspect_checkpoint
from moesaic.launch.models.config import ModelConfig
from moesaic.launch.preflight.findings import Finding, fail, ok

SHOWN = 3


def check_model(folder: str, model: ModelConfig, load_format: str) -> tuple[Finding, CheckpointFiles | None]:
    """The row, and what was found in the folder (None for dummy weights)."""
    if load_format == "dummy":
        return ok("model files", "dummy weights: none are read"), None
    files = inspect_checkpoint(Path(folder), model)
    if files.problems:
        more = len(files.problems) - SHOWN
        found = "; ".join(files.problems[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
        return fail("model files", found, "download or copy the checkpoint again, and compare the files' sizes"), files
    size = f"{files.num_bytes / 1e9:,.1f} GB" if files.num_bytes >= 1e9 else f"{files.num_bytes / 1e6:,.1f} MB"
    return ok("model files", f"{folder}: {files.num_files} files, {size}, every tensor there"), files
