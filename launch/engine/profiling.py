"""Records the timeline of one rank's steps into a file, switched by control commands in lockstep (start_profile, stop_profile).

Every rank writes <output_dir>/<profile_id>-rank<R>.trace.json on its own node, to be read by `moesaic timeline`. Off, it costs one
comparison per step. Knows no sockets; whether the other ranks could start is asked elsewhere (controls.py).
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.launch.engine.device_clock import device_clock
from moesaic.launch.engine.messages import ProfileOptions
from moesaic.overlap.timeline import Timeline
from moesaic.overlap.trace_file import save_trace

FOLDER_VARIABLE = "SGLANG_TORCH_PROFILER_DIR"
"""SGLang's name for where profiles go; the system's temporary folder when it is not set."""

logger = logging.getLogger(__name__)


class ProfileRefused(ValueError):  # noqa: N818 - reads as what happened
    """A profile that can't be started, stopped or written: says why, and what to do."""


@dataclass(kw_only=True)
class _Running:
    folder: Path
    profile_id: str
    timeline: Timeline
    num_left: int | None
    """Steps still to be launched; None: no limit."""
    num_open: int = 0
    """Steps launched but not yet done."""


class Profiling:
    """One rank's part. `group_ranks`: the ranks of its DP group, in order. `device`: where the steps compute."""

    def __init__(self, rank: int, group_ranks: range, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._group_ranks = group_ranks
        self._running: _Running | None = None
        self._last_failure = ""

    @property
    def running(self) -> bool:
        return self._running is not None

    def prepare(self, options: ProfileOptions, fallback_id: str) -> None:
        """Get ready to record; undone by `cancel`. Raises ProfileRefused."""
        if self._running is not None:
            raise ProfileRefused(f"the profile {self._running.profile_id!r} is running: stop it first")
        if options.num_steps is not None and options.num_steps < 1:
            raise ProfileRefused(f"num_steps is {options.num_steps}, it must be at least 1 (or absent: until stop_profile)")
        profile_id = options.profile_id or fallback_id
        if Path(profile_id).name != profile_id:
            raise ProfileRefused(f"profile_id {profile_id!r} must be usable as the beginning of a file's name")
        folder = Path(options.output_dir or os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir())
        _check_writable(folder)
        timeline = Timeline(rank=self._rank, device_clock=device_clock(self._device))
        self._running = _Running(folder=folder, profile_id=profile_id, timeline=timeline, num_left=options.num_steps)

    def cancel(self) -> None:
        """Forget a profile that is prepared or running."""
        self._running = None

    def files(self) -> tuple[str, ...]:
        """The files of all ranks of the DP group, of the profile that is running."""
        assert self._running is not None, "no profile is running"
        return tuple(str(_path(self._running, rank)) for rank in self._group_ranks)

    def launch_step(self) -> Timeline | None:
        """What records the step that is launched now; None: nothing."""
        running = self._running
        if running is None or running.num_left == 0:
            return None
        if running.num_left is not None:
            running.num_left -= 1
        running.num_open += 1
        return running.timeline

    def end_step(self, timeline: Timeline | None) -> None:
        """A step is done; `timeline`: what `launch_step` gave it. After the last one the file is written."""
        running = self._running
        if running is None or timeline is not running.timeline:
            return
        running.num_open -= 1
        if running.num_left == 0 and running.num_open == 0:
            try:
                self.stop()
            except ProfileRefused as error:
                self._last_failure = f"; the last one failed: {error}"
                logger.error("%s", error)

    def stop(self) -> None:
        """End the profile and write this rank's file. No step is under way. Raises ProfileRefused."""
        running, self._running = self._running, None
        if running is None:
            raise ProfileRefused(f"no profile is running{self._last_failure}")
        self._last_failure = ""
        path = _path(running, self._rank)
        try:
            save_trace(running.timeline.trace(), path)
        except OSError as error:
            raise ProfileRefused(f"the profile can't be written to {path}: {error.strerror}") from error
        logger.info("profile written to %s", path)


def _path(running: _Running, rank: int) -> Path:
    return running.folder / f"{running.profile_id}-rank{rank}.trace.json"


def _check_writable(folder: Path) -> None:
    """Now, not when the profile is over."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ProfileRefused(f"output_dir {str(folder)!r} can't be written to: {error.strerror}") from error
